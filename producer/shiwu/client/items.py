"""Checks the items of `Client.enqueue_many` and the fields for all items; unknown names are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal
from uuid import uuid4

from pydantic_core import to_json

from shiwu.client.arguments import read_text, refused
from shiwu.contract import REQUEST_FIELDS, ErrorCode, Request, RequestError, parse_request, unknown_names

CALL_ARGUMENTS: Final = (
    "lane",
    "expires_s",
    "answer_by_s",
    "countdown_s",
    "priority",
    "replicas",
    "batch_size",
    "max_waiting",
    "wait_s",
    "id_from",
    "coalesce",
)
"""Arguments of the call, which apply to all items because these are sent together."""
_ITEM_FIELDS: Final = (*REQUEST_FIELDS, "id")


def check_images(images: object) -> None:
    """Refuse a single reference, whose characters would be read as references.

    Raises:
        TypeError: `images` is a single reference, or cannot be iterated.
    """
    if isinstance(images, str | bytes | Mapping):
        raise TypeError(f"images: expected several references, got one {type(images).__name__}; use enqueue or [image]")
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected references, or mappings of a request's fields, got {images!r:.80}")


def check_shared_fields(fields: Mapping[str, Any]) -> None:
    """Refuse names that are not fields of a request.

    Raises:
        TypeError: as Python raises for unknown arguments of a function.
    """
    if "id" in fields:
        raise TypeError("id: expected in each item, got one for all items, of which only one would be answered")
    if unknown := unknown_names(fields, known=(*REQUEST_FIELDS, *CALL_ARGUMENTS)):
        raise TypeError(f"enqueue_many got unknown arguments: {unknown}")


def job_id_for(
    image: str,
    *,
    labels: str | Sequence[str] | None = None,
    top_k: int = 5,
    threshold: float | Literal["set"] = 0.0,
    min_cosine: float | None = None,
    head: str | None = None,
    want: Sequence[str] = ("tags",),
    callback: str | None = None,
    salt: str = "",
) -> str:
    """The id of a question: what `enqueue` uses with `coalesce=True`. The same in every process; asks nothing.

    The order of labels counts, because it decides between equal scores; the order of `want` does not. Metadata is no
    part of the question. The id is no secret: a program that knows the question can compute it.

    Args:
        image, labels, top_k, threshold, min_cosine, head, want, callback: as for `Client.enqueue`.
        salt: any text; another one gives another id, so that the question is answered again. Pass the id as `id` then.

    Raises:
        RequestError: an argument is invalid.
    """
    fields: dict[str, Any] = {"image": image, "labels": labels, "top_k": top_k, "threshold": threshold}
    fields |= {"min_cosine": min_cosine, "head": head, "want": want, "callback": callback}
    return question_id(parse_request(fields), salt=read_text("salt", salt))


def question_id(request: Request, *, salt: str = "") -> str:
    """The id of the question that a request asks: as `request_id`, but without metadata."""
    asked = request.model_copy(update={"metadata": None, "want": tuple(sorted(set(request.want)))})
    return request_id(asked, salt=salt)


def request_id(request: Request, *, salt: str = "") -> str:
    """An id derived from the request: the same reference, labels, options and metadata give the same id.

    The id is no secret: a program that knows the request can compute it.
    """
    text = to_json(request.model_dump(exclude_defaults=True, mode="json"))
    if salt:
        text += b"\0" + salt.encode()
    return f"ref-{hashlib.sha256(text).hexdigest()[:40]}"


def random_id(_: Request) -> str:
    """A new random id, whatever the request."""
    return str(uuid4())


def read_item(item: str | Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The request fields of one item, and its id or None.

    Raises:
        RequestError: invalid_request, for unknown or misplaced names.
    """
    if not isinstance(item, str | Mapping):
        raise refused("images", "references, or mappings of a request's fields", item)
    own = {"image": item} if isinstance(item, str) else dict(item)
    if misplaced := [name for name in CALL_ARGUMENTS if name in own]:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"{misplaced[0]}: expected as an argument of enqueue_many, for all items, got it in one item; "
            "enqueue items with another value in a separate call",
        )
    if unknown := unknown_names(own, known=_ITEM_FIELDS):
        raise RequestError(ErrorCode.INVALID_REQUEST, f"expected fields of a request in an item, got {unknown}")
    job_id = own.pop("id", None)
    return {**shared, **own}, job_id
