"""The names of keys in earlier versions, and the check at the start of a process."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions

from shiwu.broker.redis_errors import OldNames
from shiwu.contract import (
    CANVAS,
    CANVAS_DUE,
    DELAYED_MESSAGES,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    QUARANTINE,
    RETENTION,
)

if TYPE_CHECKING:
    import redis

__all__ = ["DROPPED", "MOVES", "OLD_COUNTERS", "OLD_RETENTION", "Move", "OldNames", "check_names"]


@dataclass(frozen=True, slots=True)
class Move:
    """A key that has another name now."""

    old: str
    new: str
    type: str
    """As Redis' TYPE names it."""
    has_jobs: bool
    """Whether jobs would wait forever under the old name; other keys are indexes, or written again by each worker."""


OLD_RETENTION: Final = "shiwu:limits"
MOVES: Final = (
    Move("shiwu:parked", DELAYED_MESSAGES, "hash", has_jobs=True),
    Move("shiwu:suspects", QUARANTINE, "list", has_jobs=True),
    Move("shiwu:canvas", CANVAS, "hash", has_jobs=True),
    Move("shiwu:canvas:due", CANVAS_DUE, "zset", has_jobs=False),
    Move("shiwu:asides", PENDING_ANSWERS, "hash", has_jobs=True),
    Move("shiwu:asides:expiry", PENDING_ANSWERS_EXPIRY, "zset", has_jobs=False),
    Move(OLD_RETENTION, RETENTION, "hash", has_jobs=False),
)
OLD_COUNTERS: Final = {"copies_dropped": "duplicates_dropped"}
"""Field of the counters → its name now."""
DROPPED: Final = ("shiwu:suspects:taker", "shiwu:look")
"""Keys of running processes, which expire after seconds. Those of processes that ended are of no use."""
_JOB_KEYS: Final = tuple(move.old for move in MOVES if move.has_jobs)


def check_names(client: redis.Redis) -> None:
    """Refuse a database with jobs under old names, which this version would not find; one command, two where it does.

    Nothing is checked where the user of Redis may not ask; the ACL file gives workers and sweeps that right.

    Raises:
        OldNames: there are such jobs.
        redis.RedisError: Redis is unavailable.
    """
    with suppress(exceptions.NoPermissionError):
        if client.exists(*_JOB_KEYS):
            raise OldNames(_find(client))


def _find(client: redis.Redis) -> list[str]:
    pipe = client.pipeline(transaction=False)
    for key in _JOB_KEYS:
        pipe.exists(key)
    found: list[Any] = pipe.execute()
    return [key for key, is_there in zip(_JOB_KEYS, found, strict=True) if is_there]
