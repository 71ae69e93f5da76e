"""Celery's message on Redis (protocol 2 inside kombu's envelope), read for workers. Its writer is `message`."""

from __future__ import annotations

import base64
import zlib
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
from pydantic_core import from_json

from shiwu.contract import MAX_MESSAGE_BYTES, REQUEST_FIELDS, TASK_NAME, ErrorCode, RequestError, check_id

T = TypeVar("T")
LATEST_MS: Final = 1e15
"""Times beyond this, some 31,000 years, are no times."""
MAX_ID_CHARS: Final = 255
MAX_GROUP: Final = 2**31
CANVAS_PARTS: Final = ("callbacks", "errbacks", "chain", "chord")
_DEFLATE: Final = {"application/x-gzip", "gzip", "application/zlib", "zlib"}
"""kombu's `gzip` writes zlib's format, other clients write gzip's; both are told apart by their first bytes."""


class Envelope(msgspec.Struct, frozen=True):
    """A message of a lane, read but not yet judged by the contract."""

    id: str
    fields: dict[str, Any]
    sent_ms: float | None = None
    eta_ms: float | None = None
    expires_ms: float | None = None
    ignore_result: bool = False
    canvas: tuple[str, ...] = ()
    """Names of the callback and canvas parts that the message carries."""


class _Headers(msgspec.Struct, frozen=True):
    """What is read of a message's headers; a stranger may have written anything there."""

    task: Any
    id: Any
    shiwu_sent_ms: Any = None
    eta: Any = None
    expires: Any = None
    ignore_result: Any = None
    compression: Any = None
    group: Any = None
    group_index: Any = None
    root_id: Any = None


class _Properties(msgspec.Struct, frozen=True):
    body_encoding: Any = None


class _Outer(msgspec.Struct, frozen=True, rename={"content_type": "content-type"}):
    headers: _Headers
    body: str = ""
    content_type: Any = None
    properties: _Properties | None = None


_Body = tuple[list[Any], dict[str, Any], dict[str, Any] | None]
_OUTER: Final[msgspec.json.Decoder[_Outer]] = msgspec.json.Decoder(_Outer)
_BODY: Final[msgspec.json.Decoder[_Body]] = msgspec.json.Decoder(_Body)


def read_message(raw: bytes) -> Envelope:
    """Read a message of any Celery client: arguments by position or keyword, gzip or zlib bodies, eta and expires.

    Raises:
        RequestError: malformed_message, message_too_large, unknown_task or invalid_id.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise _too_large(len(raw))
    outer = _read_outer(raw)
    headers = outer.headers
    job_id = check_id(headers.id)
    if headers.task != TASK_NAME:
        raise RequestError(ErrorCode.UNKNOWN_TASK, f"expected task {TASK_NAME!r}, got {headers.task!r:.120}")
    args, kwargs, embed = _read_body(outer)
    return Envelope(
        id=job_id,
        fields=_bind(args, kwargs),
        sent_ms=_number(headers.shiwu_sent_ms),
        eta_ms=_milliseconds(headers.eta, "eta"),
        expires_ms=_milliseconds(headers.expires, "expires"),
        ignore_result=headers.ignore_result is True,
        canvas=tuple(name for name in CANVAS_PARTS if embed.get(name)) if embed and any(embed.values()) else (),
    )


class Canvas(msgspec.Struct, frozen=True):
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
    outer = _read_outer(raw)
    headers = outer.headers
    embed = _read_body(outer)[2] or {}
    lists = {name: embed.get(name) or [] for name in ("callbacks", "errbacks", "chain")}
    chord = embed.get("chord")
    if not all(isinstance(one, list) and all(isinstance(item, dict) for item in one) for one in lists.values()):
        raise _malformed("expected callbacks, errbacks and chain as lists of signatures")
    if not isinstance(chord, dict | None):
        raise _malformed("expected chord as a signature")
    names = (headers.group, headers.root_id)
    if any(not isinstance(name, str | None) or len(name or "") > MAX_ID_CHARS for name in names):
        raise _malformed(f"expected group and root_id as texts of at most {MAX_ID_CHARS} characters")
    index = headers.group_index
    return Canvas(
        callbacks=tuple(lists["callbacks"]),
        errbacks=tuple(lists["errbacks"]),
        chain=tuple(lists["chain"]),
        chord=chord,
        group=headers.group,
        group_index=index if type(index) is int and 0 <= index < MAX_GROUP else None,
        root_id=headers.root_id,
    )


def readable_id(raw: bytes) -> str | None:
    """The valid job id of a message that otherwise can't be read, or None."""
    try:
        return check_id(_decode(_OUTER, raw[: 4 * MAX_MESSAGE_BYTES]).headers.id)
    except ValueError:
        return None


def _decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Read JSON, and what Python's own writer takes for JSON: NaN, Infinity, numbers that no double holds.

    Raises:
        ValueError: for anything else.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.convert(from_json(data), decoder.type)


def _read_outer(raw: bytes) -> _Outer:
    try:
        return _decode(_OUTER, raw)
    except ValueError as error:
        raise _malformed(
            f"expected a Celery message of protocol 2 as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None


def _read_body(outer: _Outer) -> _Body:
    if outer.content_type != "application/json":
        raise _malformed(f"expected content-type application/json, got {outer.content_type!r:.80}")
    is_base64 = outer.properties is not None and outer.properties.body_encoding == "base64"
    try:
        data = base64.b64decode(outer.body) if is_base64 else outer.body.encode()
        if outer.headers.compression:
            data = _decompress(data, str(outer.headers.compression))
        return _decode(_BODY, data)
    except RequestError:
        raise
    except ValueError as error:
        raise _malformed(
            f"expected a body of [args, kwargs, embed] as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None


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
    if not args:
        return kwargs
    if len(args) > len(REQUEST_FIELDS):
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"expected at most {len(REQUEST_FIELDS)} positional arguments, got {len(args)}",
        )
    fields = dict(zip(REQUEST_FIELDS, args, strict=False))
    if twice := fields.keys() & kwargs.keys():
        raise RequestError(ErrorCode.INVALID_REQUEST, f"got {sorted(twice)[0]!r} both by position and by keyword")
    return fields | kwargs


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
