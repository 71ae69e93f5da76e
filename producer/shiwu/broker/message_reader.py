"""Reads messages of Celery clients in kombu's envelope, task protocols 1 and 2. `message_writer` writes them."""

from __future__ import annotations

import binascii
import zlib
from datetime import UTC, tzinfo
from typing import Any, Final, TypeVar

import msgspec
from pydantic_core import from_json

from shiwu.broker.message_times import absolute_ms, number_ms
from shiwu.contract import (
    MAX_ID_BYTES,
    MAX_MESSAGE_BYTES,
    REQUEST_FIELDS,
    TASK_NAME,
    ErrorCode,
    RequestError,
    check_id,
    id_text,
)

T = TypeVar("T")
MAX_GROUP: Final = 2**31
CANVAS_PARTS: Final = ("callbacks", "errbacks", "chain", "chord")
MAX_RATIO: Final = 32
"""How much larger a compressed body may become. Messages compress to a tenth at best, unless they repeat one text."""
ANY_RATIO_BYTES: Final = 16 * 1024
"""A body that is no larger after decompression may have any ratio."""
JSON: Final = "application/json"
UTF_8: Final = {"", "utf-8", "utf8", "us-ascii", "ascii"}
_DEFLATE: Final = {"application/x-gzip", "gzip", "application/zlib", "zlib"}
"""kombu's `gzip` writes the zlib format, other clients write gzip; zlib distinguishes them by their first bytes."""


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A parsed message whose request fields are not validated yet. Times are in ms since 1970."""

    id: str
    fields: dict[str, Any]
    sent_ms: float | None = None
    eta_ms: float | None = None
    expires_ms: float | None = None
    """The job's deadline: the earlier one of Celery's `expires` and `answer_by_ms`."""
    answer_by_ms: float | None = None
    """By when the caller must have an answer."""
    ignore_result: bool = False
    canvas: tuple[str, ...] = ()
    """Names of the callback and canvas parts that the message carries."""
    has_reply_to: bool = False
    """Whether the sender waits as Celery's clients do, on the channel of its result."""


class _Headers(msgspec.Struct, frozen=True, gc=False):
    """The headers that are read. Fields have the type `Any`, because a client may write any JSON there.

    Messages of task protocol 1 have the same fields in their body.
    """

    task: Any = None
    id: Any = None
    shiwu_sent_ms: Any = None
    shiwu_answer_by_ms: Any = None
    eta: Any = None
    expires: Any = None
    ignore_result: Any = None
    compression: Any = None
    group: Any = None
    group_index: Any = None
    root_id: Any = None


class _Properties(msgspec.Struct, frozen=True, gc=False):
    body_encoding: Any = None
    correlation_id: Any = None
    reply_to: Any = None


class _Outer(msgspec.Struct, frozen=True, gc=False, rename={"content_type": "content-type"}):
    headers: _Headers = msgspec.field(default_factory=_Headers)
    body: str = ""
    content_type: Any = None
    properties: _Properties | None = None


_Body = tuple[list[Any] | None, dict[str, Any] | list[Any] | None, dict[str, Any] | list[Any] | None]
_CheckedBody = tuple[list[Any], dict[str, Any], dict[str, Any]]
_OUTER: Final[msgspec.json.Decoder[_Outer]] = msgspec.json.Decoder(_Outer)
_BODY: Final[msgspec.json.Decoder[_Body]] = msgspec.json.Decoder(_Body)
_FIELDS: Final[msgspec.json.Decoder[dict[str, Any]]] = msgspec.json.Decoder(dict[str, Any])


def read_message(raw: bytes, *, zone: tzinfo = UTC) -> Envelope:
    """Parse a message of any Celery client: arguments by position or keyword, gzip or zlib bodies, eta and expires.

    Args:
        zone: time zone of an eta or expires without one.

    Raises:
        RequestError: malformed_message, message_too_large, unknown_task or invalid_id.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise _too_large(len(raw))
    outer = _read_outer(raw)
    headers = outer.headers
    has_id = (type(headers.id) is str and headers.id != "") or id_text(headers.id) is not None
    is_complete = has_id and headers.task is not None
    if not is_complete:
        headers, body = _complete(outer)
    job_id = check_id(headers.id) if type(headers.id) is str else _checked_id(headers.id)
    if headers.task != TASK_NAME:
        raise RequestError(ErrorCode.UNKNOWN_TASK, f"expected task {TASK_NAME!r}, got {headers.task!r:.120}")
    if is_complete:
        data = _body_bytes(outer)
        body = _complete(outer)[1] if data[:1] == b"{" else _read_body(data)
    args, kwargs, embed = body
    expires_ms = None if headers.expires is None else absolute_ms(headers.expires, "expires", zone=zone)
    answer_by_ms = number_ms(headers.shiwu_answer_by_ms)
    if answer_by_ms is not None:
        expires_ms = answer_by_ms if expires_ms is None else min(expires_ms, answer_by_ms)
    return Envelope(
        id=job_id,
        fields=_bind(args, kwargs),
        sent_ms=number_ms(headers.shiwu_sent_ms),
        eta_ms=None if headers.eta is None else absolute_ms(headers.eta, "eta", zone=zone),
        expires_ms=expires_ms,
        answer_by_ms=answer_by_ms,
        ignore_result=headers.ignore_result is True,
        canvas=tuple(name for name in CANVAS_PARTS if embed.get(name)) if embed and any(embed.values()) else (),
        has_reply_to=outer.properties is not None and bool(outer.properties.reply_to),
    )


class Canvas(msgspec.Struct, frozen=True):
    """The callbacks of a message, as Celery signatures: what Celery runs after the job."""

    callbacks: tuple[dict[str, Any], ...]
    errbacks: tuple[dict[str, Any], ...]
    chain: tuple[dict[str, Any], ...]
    """The following tasks, last first, as Celery writes them."""
    chord: dict[str, Any] | None
    group: str | None
    group_index: int | None
    root_id: str | None


def read_canvas(raw: bytes) -> Canvas:
    """The callbacks of a message that `read_message` accepts.

    Raises:
        RequestError: malformed_message, where they are not signatures.
    """
    headers, (_, _, embed) = _complete(_read_outer(raw))
    lists = {name: embed.get(name) or [] for name in ("callbacks", "errbacks", "chain")}
    chord = embed.get("chord")
    if not all(isinstance(part, list) and all(isinstance(item, dict) for item in part) for part in lists.values()):
        raise _malformed("expected callbacks, errbacks and chain as lists of signatures")
    if not isinstance(chord, dict | None):
        raise _malformed("expected chord as a signature")
    names = (headers.group, headers.root_id)
    if any(not isinstance(name, str | None) or len((name or "").encode()) > MAX_ID_BYTES for name in names):
        raise _malformed(f"expected group and root_id as texts of at most {MAX_ID_BYTES} bytes")
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


# ------------------------------------------------------------------------------------ the envelope
def _decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Parse JSON, also with NaN, Infinity and large integers, which Python's json module writes.

    Raises:
        ValueError: it is not JSON, or does not match the type of the decoder.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.convert(from_json(data), decoder.type)


def _read_outer(raw: bytes) -> _Outer:
    try:
        try:
            return _OUTER.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            return msgspec.convert(_without_empty_lists(from_json(raw)), _Outer)
    except ValueError as error:
        raise _malformed(f"expected a Celery message as JSON ({type(error).__name__}: {error!s:.120})") from None


def _without_empty_lists(outer: object) -> Any:
    """The object without empty lists and nulls: PHP writes an empty object as a list, and other clients as null."""
    if isinstance(outer, dict):
        return {name: value for name, value in outer.items() if value not in ([], None)}
    return outer


def _complete(outer: _Outer) -> tuple[_Headers, _CheckedBody]:
    """Headers and body, with task name and id from wherever the client wrote them.

    In task protocol 1 they are in the body. Where neither place has an id, the correlation id is the id, as in
    `claim.lua`.
    """
    headers, data = outer.headers, _body_bytes(outer)
    if data.lstrip()[:1] == b"{":
        fields = _read_json(data)
        if headers.task is not None and "args" not in fields:
            raise _malformed("expected a body of [args, kwargs, embed], or an object with args and kwargs")
        known = {name: value for name, value in msgspec.structs.asdict(headers).items() if value is not None}
        if id_text(headers.id) is None:
            known.pop("id", None)
        headers = msgspec.convert({"group": fields.get("taskset")} | fields | known, _Headers)
        embed = {name: fields.get(name) for name in CANVAS_PARTS}
        body = _checked_body(fields.get("args"), fields.get("kwargs"), embed)
    else:
        body = _read_body(data)
    if id_text(headers.id) is None and outer.properties is not None:
        headers = msgspec.structs.replace(headers, id=outer.properties.correlation_id)
    return headers, body


def _checked_id(value: object) -> str:
    if (job_id := id_text(value)) is None:
        raise _malformed("expected an id in the headers, in the body (task protocol 1) or as correlation_id, got none")
    return check_id(job_id)


# ------------------------------------------------------------------------------------ the body
def _body_bytes(outer: _Outer) -> bytes:
    """The body as JSON text, decompressed."""
    if outer.content_type != JSON:
        _check_content_type(outer.content_type)
    is_base64 = outer.properties is not None and outer.properties.body_encoding == "base64"
    try:
        data = binascii.a2b_base64(outer.body) if is_base64 else outer.body.encode()
    except ValueError as error:
        raise _malformed(f"expected a body in base64 ({error!s:.120})") from None
    return _decompress(data, str(outer.headers.compression)) if outer.headers.compression else data


def _check_content_type(content_type: object) -> None:
    kind, *parameters = str(content_type).lower().split(";")
    charset = next((text.split("=")[1].strip(' "') for text in parameters if text.strip().startswith("charset=")), "")
    if kind.strip() != JSON or charset not in UTF_8:
        raise _malformed(f"expected content-type {JSON} in UTF-8, got {content_type!r:.80}")


def _read_body(data: bytes) -> _CheckedBody:
    try:
        args, kwargs, embed = _decode(_BODY, data)
    except ValueError as error:
        raise _malformed(
            f"expected a body of [args, kwargs, embed] as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None
    if type(args) is list and type(kwargs) is dict and type(embed) is dict:
        return args, kwargs, embed
    return _checked_body(args, kwargs, embed)


def _checked_body(args: object, kwargs: object, embed: object) -> _CheckedBody:
    """The parts of a body. Null and an empty list, which PHP writes, stand for an empty object."""
    args, kwargs, embed = args or [], kwargs or {}, embed or {}
    if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict)):
        kinds = ", ".join(type(part).__name__ for part in (args, kwargs, embed))
        raise _malformed(f"expected args as a list, kwargs and embed as objects, got {kinds}")
    return args, kwargs, embed


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        return _decode(_FIELDS, data)
    except ValueError as error:
        raise _malformed(
            f"expected a body with task, id, args and kwargs as JSON ({type(error).__name__}: {error!s:.120})"
        ) from None


def _decompress(data: bytes, compression: str) -> bytes:
    if compression not in _DEFLATE:
        raise _malformed(f"expected compression gzip or zlib, got {compression!r:.80}")
    try:
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        most = min(MAX_MESSAGE_BYTES, max(ANY_RATIO_BYTES, MAX_RATIO * len(data)))
        plain = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise _malformed(f"expected a {compression} body ({error})") from None
    if len(plain) > MAX_MESSAGE_BYTES:
        raise _too_large(len(plain))
    if len(plain) > most:
        text = (
            f"expected a {compression} body that grows at most {MAX_RATIO} times, got {len(data)} bytes that grow more"
        )
        raise RequestError(ErrorCode.MESSAGE_TOO_LARGE, text)
    return plain


def _bind(args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind positional arguments to the request's fields in their order, as Python does."""
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


def _malformed(message: str) -> RequestError:
    return RequestError(ErrorCode.MALFORMED_MESSAGE, message)


def _too_large(size: int) -> RequestError:
    return RequestError(
        ErrorCode.MESSAGE_TOO_LARGE,
        f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, got {size} or more",
    )
