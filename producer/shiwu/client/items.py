"""What `Client.enqueue_many` is given: items, and fields for all items. Names that would have no effect are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic_core import to_json

from shiwu.client.arguments import refused
from shiwu.contract import REQUEST_FIELDS, ErrorCode, Request, RequestError, unknown_names

OF_THE_CALL: Final = (
    *("lane", "expires_s", "answer_by_s", "countdown_s", "priority", "replicas"),
    *("batch_size", "max_waiting", "wait_s", "id_from"),
)
"""They hold for all items of a call, which are sent together."""
_OF_AN_ITEM: Final = (*REQUEST_FIELDS, "id")


def check_images(images: object) -> None:
    """Refuse one reference where many are expected: its letters would be taken for references.

    Raises:
        TypeError: says what to do.
    """
    if isinstance(images, str | bytes | Mapping):
        raise TypeError(f"images: expected several references, got one {type(images).__name__}; use enqueue or [image]")
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected references, or mappings of a request's fields, got {images!r:.80}")


def check_shared_fields(fields: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of a request.

    Raises:
        TypeError: names them, as Python does for a function's own arguments.
    """
    if "id" in fields:
        raise TypeError("id: expected in each item, got one for all items, of which only one would be answered")
    if unknown := unknown_names(fields, known=(*REQUEST_FIELDS, *OF_THE_CALL)):
        raise TypeError(f"enqueue_many got unknown arguments: {unknown}")


def request_id(request: Request) -> str:
    """An id that is made of what is asked: the same reference with the same labels and options gives the same id.

    Who knows the request knows the id, so it protects nothing.
    """
    asked = request.model_dump(exclude_defaults=True, mode="json")
    return f"ref-{hashlib.sha256(to_json(asked)).hexdigest()[:40]}"


def read_item(item: str | Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The request fields of one item, and its id if it brings one.

    Raises:
        RequestError: invalid_request, for names that would have no effect.
    """
    if not isinstance(item, str | Mapping):
        raise refused("images", "references, or mappings of a request's fields", item)
    own = {"image": item} if isinstance(item, str) else dict(item)
    if misplaced := [name for name in OF_THE_CALL if name in own]:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"{misplaced[0]}: expected as an argument of enqueue_many, for all items, got it in one item; "
            "enqueue items that differ in it by a call of their own",
        )
    if unknown := unknown_names(own, known=_OF_AN_ITEM):
        raise RequestError(ErrorCode.INVALID_REQUEST, f"expected fields of a request in an item, got {unknown}")
    job_id = own.pop("id", None)
    return {**shared, **own}, job_id
