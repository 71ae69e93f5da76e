"""Checks of the arguments of `Client`: each says the name, what was expected and what came.

A wrong type would otherwise fail somewhere inside with a text about operators, and NaN would be waited for without end.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Final

from shiwu.contract import ErrorCode, RequestError

MAX_TIME_S: Final = 10 * 365 * 86_400.0
MAX_WHOLE: Final = 2**31
MAX_LOOKED_UP_ID_BYTES: Final = 4096
"""A job id has 255 bytes at most; a refused message is answered under a longer one too."""


def refused(name: str, expected: str, value: object) -> RequestError:
    """The error for an argument that cannot be."""
    return RequestError(ErrorCode.INVALID_REQUEST, f"{name}: expected {expected}, got {value!r:.80}")


def read_seconds(name: str, value: Any, *, least: float = 0.0, most: float = MAX_TIME_S) -> float:
    """A duration.

    Raises:
        RequestError: it is no number of this range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise refused(name, f"a number of seconds, {least:g} to {most:.0f}", value)
    return float(value)


def read_whole(name: str, value: Any, *, least: int = 0, most: int = MAX_WHOLE) -> int:
    """A whole number.

    Raises:
        RequestError: it is none of this range.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or not least <= int(value) <= most:
        raise refused(name, f"a whole number, {least} to {most}", value)
    return int(value)


def read_text(name: str, value: Any, *, least: int = 0, most: int = 1000) -> str:
    """A text of so many characters.

    Raises:
        RequestError: it is none, or one that UTF-8 cannot write.
    """
    if not isinstance(value, str) or not least <= len(value) <= most or not _is_utf8(value):
        raise refused(name, f"a text of {least} to {most} characters", value)
    return value


def read_id(value: Any) -> str:
    """An id to look for, also one that no job can have: its message was refused under it.

    Raises:
        RequestError: invalid_id.
    """
    if isinstance(value, str) and _is_utf8(value) and 1 <= len(value.encode()) <= MAX_LOOKED_UP_ID_BYTES:
        return value
    text = f"expected an id as a text of 1 to {MAX_LOOKED_UP_ID_BYTES} bytes in UTF-8, got {value!r:.80}"
    raise RequestError(ErrorCode.INVALID_ID, text)


def read_ids(name: str, values: Any) -> list[str]:
    """Ids to look for; one text is one id.

    Raises:
        RequestError: there are no ids, or one that cannot be.
    """
    if isinstance(values, str):
        return [read_id(values)]
    if not isinstance(values, Iterable) or isinstance(values, bytes | bytearray):
        raise refused(name, "an id, or several of them", values)
    return [read_id(value) for value in values]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
