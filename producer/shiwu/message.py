"""Celery's message on Redis (protocol 2 inside kombu's envelope): written for producers, read for workers.

The format is described in https://docs.celeryq.dev/en/stable/internals/protocol.html; a test holds what is written here
against Celery's own. Celery is not imported, so that a producer stays light.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import uuid4

from pydantic_core import from_json, to_json

from shiwu.contract import (
    MAX_MESSAGE_BYTES,
    REQUEST_FIELDS,
    TASK_NAME,
    ErrorCode,
    Lane,
    Request,
    RequestError,
    check_id,
)

SENT_HEADER: Final = "shiwu_sent_ms"
LATEST_MS: Final = 1e15
"""Times beyond this, some 31,000 years, are no times."""
_DEFLATE: Final = {"application/x-gzip", "gzip", "application/zlib", "zlib"}
"""kombu's `gzip` writes zlib's format, other clients write gzip's; both are told apart by their first bytes."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message of a lane, read but not yet judged by the contract."""

    id: str
    fields: dict[str, Any]
    sent_ms: float | None = None
    eta_ms: float | None = None
    expires_ms: float | None = None
    ignore_result: bool = False
    canvas: tuple[str, ...] = ()
    """Names of the callback and canvas parts that the message carries."""


@lru_cache(maxsize=1)
def _origin() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def build_message(
    request: Request,
    *,
    job_id: str,
    lane: Lane,
    sent_ms: float | None = None,
    expires_ms: float | None = None,
    eta_ms: float | None = None,
    priority: int = 0,
    ignore_result: bool = False,
) -> bytes:
    """The bytes to LPUSH to the lane. Times are milliseconds since 1970 by Redis' clock."""
    body = to_json(
        [
            [],
            request.model_dump(exclude_defaults=True, mode="json"),
            {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
        ]
    )
    headers: dict[str, Any] = {
        "lang": "py",
        "task": TASK_NAME,
        "id": job_id,
        "shadow": None,
        "eta": _iso(eta_ms),
        "expires": _iso(expires_ms),
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": job_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": _origin(),
        "ignore_result": ignore_result,
        SENT_HEADER: sent_ms,
    }
    return to_json(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                "correlation_id": job_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": lane.queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )


def read_message(raw: bytes) -> Envelope:
    """Read a message of any Celery client: arguments by position or keyword, gzip or zlib bodies, eta and expires.

    Raises:
        RequestError: malformed_message, message_too_large, unknown_task or invalid_id.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise _too_large(len(raw))
    try:
        outer = from_json(raw)
        headers = outer["headers"]
        task, job_id = headers["task"], headers["id"]
    except (ValueError, TypeError, KeyError) as error:
        raise _malformed(
            f"expected a Celery message of protocol 2 as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None
    job_id = check_id(job_id)
    if task != TASK_NAME:
        raise RequestError(ErrorCode.UNKNOWN_TASK, f"expected task {TASK_NAME!r}, got {task!r:.120}")
    args, kwargs, embed = _read_body(outer, headers)
    return Envelope(
        id=job_id,
        fields=_bind(args, kwargs),
        sent_ms=_number(headers.get(SENT_HEADER)),
        eta_ms=_milliseconds(headers.get("eta"), "eta"),
        expires_ms=_milliseconds(headers.get("expires"), "expires"),
        ignore_result=headers.get("ignore_result") is True,
        canvas=tuple(name for name in ("callbacks", "errbacks", "chain", "chord") if embed.get(name)),
    )


@dataclass(frozen=True, slots=True)
class Canvas:
    """What Celery shall do when the job has ended, as the message's signatures say it."""

    callbacks: tuple[dict[str, Any], ...]
    errbacks: tuple[dict[str, Any], ...]
    chain: tuple[dict[str, Any], ...]
    """What follows, last first, as Celery writes it."""
    chord: dict[str, Any] | None
    group: str | None
    group_index: int | None
    root_id: str | None


def read_canvas(raw: bytes) -> Canvas:
    """The callbacks of a message that `read_message` has accepted.

    Raises:
        RequestError: malformed_message, when they are no signatures.
    """
    outer = from_json(raw)
    headers = outer["headers"]
    _, _, embed = _read_body(outer, headers)
    lists = {name: embed.get(name) or [] for name in ("callbacks", "errbacks", "chain")}
    chord = embed.get("chord")
    if not all(isinstance(one, list) and all(isinstance(item, dict) for item in one) for one in lists.values()):
        raise _malformed("expected callbacks, errbacks and chain as lists of signatures")
    if not isinstance(chord, dict | None):
        raise _malformed("expected chord as a signature")
    index = headers.get("group_index")
    return Canvas(
        callbacks=tuple(lists["callbacks"]),
        errbacks=tuple(lists["errbacks"]),
        chain=tuple(lists["chain"]),
        chord=chord,
        group=headers.get("group"),
        group_index=index if isinstance(index, int) else None,
        root_id=headers.get("root_id"),
    )


def readable_id(raw: bytes) -> str | None:
    """The valid job id of a message that otherwise can't be read, or None."""
    try:
        return check_id(from_json(raw[: 4 * MAX_MESSAGE_BYTES])["headers"]["id"])
    except (ValueError, TypeError, KeyError):
        return None


def _read_body(outer: dict[str, Any], headers: dict[str, Any]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    if outer.get("content-type") != "application/json":
        raise _malformed(f"expected content-type application/json, got {outer.get('content-type')!r:.80}")
    try:
        body = outer["body"]
        properties = outer.get("properties") or {}
        data: bytes = base64.b64decode(body) if properties.get("body_encoding") == "base64" else body.encode()
        if compression := headers.get("compression"):
            data = _decompress(data, str(compression))
        parsed = from_json(data)
        args, kwargs, embed = parsed
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
        if isinstance(error, RequestError):
            raise
        raise _malformed(
            f"expected a body of [args, kwargs, embed] as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None
    if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict | None)):
        raise _malformed("expected a body of [list, object, object]")
    return args, kwargs, embed or {}


def _decompress(data: bytes, compression: str) -> bytes:
    if compression not in _DEFLATE:
        raise _malformed(f"expected compression gzip or zlib, got {compression!r:.80}")
    try:
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        plain = unpacker.decompress(data, MAX_MESSAGE_BYTES + 1)
    except zlib.error as error:
        raise _malformed(f"expected a {compression} body ({error})") from None
    if len(plain) > MAX_MESSAGE_BYTES:
        raise _too_large(len(plain))
    return plain


def _bind(args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments in the order of the request's fields, as Python would bind them."""
    if len(args) > len(REQUEST_FIELDS):
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"expected at most {len(REQUEST_FIELDS)} positional arguments, got {len(args)}",
        )
    fields = dict(zip(REQUEST_FIELDS, args, strict=False))
    if twice := fields.keys() & kwargs.keys():
        raise RequestError(ErrorCode.INVALID_REQUEST, f"got {sorted(twice)[0]!r} both by position and by keyword")
    return fields | kwargs


def _iso(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()


def _milliseconds(value: object, name: str) -> float | None:
    """Celery writes absolute times as ISO 8601; a time without zone is UTC."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)  # type: ignore[arg-type]  # anything may stand here; TypeError is caught
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
    except (TypeError, ValueError, OverflowError):
        raise _malformed(f"expected {name} as an ISO 8601 time, got {value!r:.80}") from None


def _number(value: object) -> float | None:
    """A time of a stranger's header, or None where it is none: no infinity, and no integer that no float can hold."""
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST_MS
    return float(value) if is_time else None  # type: ignore[arg-type]  # narrowed above


def _malformed(message: str) -> RequestError:
    return RequestError(ErrorCode.MALFORMED_MESSAGE, message)


def _too_large(size: int) -> RequestError:
    return RequestError(
        ErrorCode.MESSAGE_TOO_LARGE,
        f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, got {size} or more",
    )


__all__ = ["Canvas", "Envelope", "build_message", "read_canvas", "read_message", "readable_id"]
