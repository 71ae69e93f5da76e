"""Finds the id of a message that the worker refuses, so that its caller finds the answer.

`claim.lua` reads the ids of regular messages. This module reads all others: messages of any size, ids of any length,
and JSON that only lenient parsers accept.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, Final

from shiwu.contract import id_text

MAX_JSON_BYTES: Final = 4 * 1024 * 1024
MAX_LOGGED_ID_BYTES: Final = 4096
HEAD_CHARS: Final = 64 * 1024
"""How much of a long base64 body is decoded to find its id; a multiple of 4."""
_BODY = re.compile(r'"body"\s*:\s*"')
_BODY_END = re.compile(r'(?<!\\)"')
_ID_FIRST = re.compile(r'\s*\{\s*(?:"task"\s*:\s*"[^"\\]*"\s*,\s*)?"id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')
"""The id in the first part of a body: Celery, gocelery, celery.node and celery-php write it first or after the task."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def find_id(raw: bytes) -> str | None:
    """The id under which the sender of this message looks for its answer, or None where it has none.

    A lone surrogate, which no Redis key can hold, is replaced by U+FFFD, as JavaScript does.
    """
    text = raw.decode("utf-8", "replace")
    message = _parse(text) if len(raw) <= MAX_JSON_BYTES else None
    body: object = message.get("body") if message else None
    if message is None:
        rest, body = _without_body(text)
        message = _parse(rest) if len(rest) <= MAX_JSON_BYTES else None
    if message is None:
        return None
    headers, properties = _object(message.get("headers")), _object(message.get("properties"))
    found = id_text(headers.get("id"))
    if found is None and isinstance(body, str):
        found = _body_id(body, is_base64=properties.get("body_encoding") == "base64")
    if found is None:
        found = id_text(properties.get("correlation_id"))
    job_id = _SURROGATE.sub("\ufffd", found or "")
    return job_id if 1 <= len(job_id.encode()) <= MAX_LOGGED_ID_BYTES else None


def _without_body(text: str) -> tuple[str, str | None]:
    """The message with an empty body, and the body, still escaped.

    The body ends at the first quote without a backslash, because it is base64 or JSON that ends with a bracket.
    """
    begin = _BODY.search(text)
    end = _BODY_END.search(text, begin.end()) if begin else None
    if begin is None or end is None:
        return text, None
    return text[: begin.end()] + text[end.start() :], text[begin.end() : end.start()]


def _body_id(body: str, *, is_base64: bool) -> str | None:
    """The id in a body of task protocol 1."""
    if len(body) <= MAX_JSON_BYTES:
        return id_text(_object(_parse(_plain(body) if is_base64 else body)).get("id"))
    head = body[:HEAD_CHARS]
    found = _ID_FIRST.match(_plain(head) if is_base64 else _unescaped(head))
    return id_text(_object(_parse(f'{{"id":{found[1]}}}')).get("id")) if found else None


def _unescaped(head: str) -> str:
    """The beginning of a JSON text without its string escapes; an escape at the end may be cut."""
    for cut in range(6):
        if read := _parse(f'{{"head":"{head[: len(head) - cut]}"}}'):
            return str(read["head"])
    return ""


def _plain(body: str) -> str:
    try:
        return base64.b64decode(body).decode("utf-8", "replace")
    except (ValueError, binascii.Error):
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    """A JSON object, or None. Python's own parser accepts lone surrogates, NaN and Infinity."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
