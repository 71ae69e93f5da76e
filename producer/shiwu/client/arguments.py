"""Checks the arguments of `Client`. Each error names the argument, what was expected and what came.

Without the checks a wrong type would fail deep inside with an unclear text, and a time-out of NaN would never end.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Final, TypeVar

from shiwu.contract import ErrorCode, RequestError

T = TypeVar("T")
MAX_TIME_S: Final = 10 * 365 * 86_400.0
MAX_INTEGER: Final = 2**31
MAX_LOOKED_UP_ID_BYTES: Final = 4096
"""Longer than a job id may be (255 bytes), because refused messages are answered under longer ids too."""


def refused(name: str, expected: str, value: object) -> RequestError:
    """The error for an invalid argument."""
    return RequestError(ErrorCode.INVALID_REQUEST, f"{name}: expected {expected}, got {value!r:.80}")


def read_seconds(name: str, value: Any, *, least: float = 0.0, most: float = MAX_TIME_S) -> float:
    """Check a duration in seconds, and return it as a float.

    Raises:
        RequestError: it is not a number from `least` to `most`.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise refused(name, f"a number of seconds, {least:g} to {most:.0f}", value)
    return float(value)


def read_integer(name: str, value: Any, *, least: int = 0, most: int = MAX_INTEGER) -> int:
    """Check an integer, and return it as an int.

    Raises:
        RequestError: it is not an integer from `least` to `most`.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not least <= int(value) <= most:
        raise refused(name, f"a whole number, {least} to {most}", value)
    return int(value)


def read_text(name: str, value: object, *, least: int = 0, most: int = 1000) -> str:
    """Check a text of `least` to `most` characters.

    Raises:
        RequestError: it is not such a text, or UTF-8 cannot encode it.
    """
    if not isinstance(value, str) or not least <= len(value) <= most or not _is_utf8(value):
        raise refused(name, f"a text of {least} to {most} characters", value)
    return value


def read_type(name: str, value: T, kind: type | tuple[type, ...], expected: str) -> T:
    """Check that a value is of a type, and return it.

    Args:
        expected: what the error says in place of the type.

    Raises:
        RequestError: it is not.
    """
    if not isinstance(value, kind):
        raise refused(name, expected, value)
    return value


def read_id(value: object) -> str:
    """Check an id to look up. It may be longer than a job id: refused messages are answered under such ids too.

    Raises:
        RequestError: invalid_id.
    """
    if isinstance(value, str) and _is_utf8(value) and 1 <= len(value.encode()) <= MAX_LOOKED_UP_ID_BYTES:
        return value
    text = f"expected an id as a text of 1 to {MAX_LOOKED_UP_ID_BYTES} bytes in UTF-8, got {value!r:.80}"
    raise RequestError(ErrorCode.INVALID_ID, text)


def read_ids(name: str, values: object) -> list[str]:
    """Check ids to look up; a single text counts as one id.

    Raises:
        RequestError: these are not ids, or one of them is invalid.
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
