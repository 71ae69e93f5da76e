"""Times in messages of Celery clients: ISO 8601 texts as Celery writes them, or numbers since 1970."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import Any, Final

from shiwu.contract import ErrorCode, RequestError

LATEST_MS: Final = 1e15
"""Times beyond this, some 31,000 years, are no times."""
FIRST_S: Final = 1e9
"""September 2001. A smaller number is a duration that a client took for a time."""
FIRST_MS: Final = 1e11
"""A number from here on counts milliseconds, as JavaScript does: as seconds it lies beyond the year 5000."""


def absolute_ms(value: Any, name: str, *, zone: tzinfo = UTC) -> float | None:
    """Milliseconds since 1970 of an `eta` or `expires`, or None where there is none.

    Args:
        zone: time zone of a text that names none, as Celery's setting `timezone`.

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
    elif (number := number_ms(value)) is not None and number >= FIRST_S:
        return number if number >= FIRST_MS else number * 1000
    raise RequestError(
        ErrorCode.MALFORMED_MESSAGE,
        f"expected {name} as an ISO 8601 time or as seconds or milliseconds since 1970, got {value!r:.80}",
    )


def number_ms(value: object) -> float | None:
    """A number of a header, or None where it is no time: no infinity, and no integer that no float can hold."""
    if type(value) is float and -LATEST_MS < value < LATEST_MS:
        return value
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST_MS
    return float(value) if is_time else None  # type: ignore[arg-type]  # narrowed above
