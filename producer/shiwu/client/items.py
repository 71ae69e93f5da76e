"""Checks the items of `Client.enqueue_many` and the fields for all items; unknown names are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

from pydantic_core import to_json

from shiwu.client.arguments import refused
from shiwu.contract import REQUEST_FIELDS, ErrorCode, Request, RequestError, unknown_names

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


def request_id(request: Request) -> str:
    """An id derived from the request: the same reference, labels and options give the same id.

    The id is no secret: a program that knows the request can compute it.
    """
    fields = request.model_dump(exclude_defaults=True, mode="json")
    return f"ref-{hashlib.sha256(to_json(fields)).hexdigest()[:40]}"


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
