"""Job ids. Whatever Celery takes for a task id is a job id, because its caller looks for the answer under it."""

from __future__ import annotations

import math
import re
from typing import Final

from shiwu.contract.vocabulary import ErrorCode, RequestError

MAX_ID_BYTES: Final = 255
"""Length of a short string in AMQP, which bounds the ids of all Celery clients."""
_DIGEST = re.compile(r"~[0-9a-f]{40}")


def check_id(job_id: object) -> str:
    """Return the id, or raise RequestError(invalid_id).

    An id is any text of 1 to 255 bytes as UTF-8, but for `~` with 40 hexadecimal digits: that is the name of a message
    without an id.
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
    """Whether this is the name that the worker gives to a message without a readable id: `~` and its SHA-1."""
    return job_id.startswith("~") and _DIGEST.fullmatch(job_id) is not None


def id_text(value: object) -> str | None:
    """The id that a client means by this JSON value: a text, or a number as most languages write it.

    None for all other values, also for the empty text: Celery then makes an id itself.
    """
    if isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None
