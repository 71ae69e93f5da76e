"""Reads times in messages of Celery clients: ISO 8601 texts, or seconds or milliseconds since 1970."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import Final

from shiwu.contract import ErrorCode, RequestError

MAX_MS: Final = 1e15
"""About 31,000 years; a larger number is not a time."""
MIN_TIME_S: Final = 1e9
"""September 2001; a smaller number is a duration that a client sent as a time."""
MIN_TIME_MS: Final = 1e11
"""A number from here on counts milliseconds, as in JavaScript: as seconds it would be after the year 5000."""


def absolute_ms(value: object, name: str, *, zone: tzinfo = UTC) -> float | None:
    """Milliseconds since 1970 of an `eta` or `expires`, or None where there is none.

    Args:
        name: name of the field, for the error text.
        zone: time zone of a text without one, as Celery's setting `timezone`.

    Raises:
        RequestError: malformed_message.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp() * 1000
        except (ValueError, OverflowError):
            pass
    elif (number := number_ms(value)) is not None and number >= MIN_TIME_S:
        return number if number >= MIN_TIME_MS else number * 1000
    raise RequestError(
        ErrorCode.MALFORMED_MESSAGE,
        f"expected {name} as an ISO 8601 time or as seconds or milliseconds since 1970, got {value!r:.80}",
    )


def number_ms(value: object) -> float | None:
    """A finite number of a header, or None. A text, a bool, an infinity and a number beyond `MAX_MS` give None."""
    if value is None or (type(value) is float and -MAX_MS < value < MAX_MS):
        return value
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_MS
    return float(value) if is_time else None  # type: ignore[arg-type]  # narrowed above
