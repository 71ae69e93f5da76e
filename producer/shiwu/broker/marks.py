"""Reads the marks of answered ids, in the form of this version and in that of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shiwu.contract import MARKS, done_key


def read_marks(client: Any, ids: Sequence[str]) -> list[bytes | None]:
    """The mark of each id, or None. One round trip.

    Raises:
        redis.RedisError: Redis is unavailable.
    """
    if not ids:
        return []
    pipe = client.pipeline(transaction=False)
    ask_for_marks(pipe, ids)
    return found_marks(pipe.execute())


def ask_for_marks(pipe: Any, ids: Sequence[str]) -> None:
    """Add the commands to a pipeline whose replies `found_marks` reads."""
    for key in MARKS:
        pipe.hmget(key, ids)
    pipe.mget([done_key(job_id) for job_id in ids])


def found_marks(replies: Sequence[Sequence[bytes | None]]) -> list[bytes | None]:
    """The mark of each id from the replies to `ask_for_marks`."""
    return [next((mark for mark in found if mark is not None), None) for found in zip(*replies, strict=True)]


MARK_REPLIES = len(MARKS) + 1
"""How many replies `found_marks` reads."""
