"""Checks job ids. Every valid Celery task id is a valid job id, because its caller looks for the answer under it."""

from __future__ import annotations

import math
import re
from typing import Final

from shiwu.contract.vocabulary import ErrorCode, RequestError

MAX_ID_BYTES: Final = 255
"""Length of a short string in AMQP, which limits the ids of all Celery clients."""
_DIGEST = re.compile(r"~[0-9a-f]{40}")


def check_id(job_id: object) -> str:
    """Return the id if it is valid: a text of 1 to 255 bytes in UTF-8.

    `~` with 40 hexadecimal digits is refused: workers name messages without an id so.

    Raises:
        RequestError: invalid_id.
    """
    if type(job_id) is str and 1 <= len(job_id) <= MAX_ID_BYTES and job_id.isascii() and job_id[0] != "~":
        return job_id
    if isinstance(job_id, str) and not is_digest(job_id):
        try:
            size = len(job_id.encode())
        except UnicodeEncodeError:
            size = 0
        if 1 <= size <= MAX_ID_BYTES:
            return job_id
    raise RequestError(
        ErrorCode.INVALID_ID, f"expected an id of 1 to {MAX_ID_BYTES} bytes in UTF-8, got {job_id!r:.80}"
    )


def is_digest(job_id: str) -> bool:
    """Whether this is the name of a message without a readable id: `~` and the SHA-1 of the message."""
    return job_id.startswith("~") and _DIGEST.fullmatch(job_id) is not None


def id_text(value: object) -> str | None:
    """The id that this JSON value stands for: a text, or the digits of a number.

    None for every other value, and for the empty text.
    """
    if isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None
