"""Moves what is under the names of earlier versions, in portions. A run that was interrupted is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shiwu.broker.migration.old_names import DROPPED, MOVES, OLD_COUNTERS, Move
from shiwu.broker.queue_stats import read_workers
from shiwu.broker.script_loader import load_script
from shiwu.contract import COUNTERS

if TYPE_CHECKING:
    import redis

MAX_MOVED: Final = 500
"""Fields, members or items of one portion. The server answers other clients between two portions."""
_SIZES: Final = {"hash": "hlen", "zset": "zcard", "list": "llen"}


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved, or would be."""

    old: str
    new: str
    """Empty for a key that is dropped."""
    count: int
    """Fields, members or items; the value of a counter."""
    kept: int = 0
    """How many of them were under the new name already, which keeps its value."""


def find_workers(client: redis.Redis) -> tuple[str, ...]:
    """Names of the workers of any version that had a heartbeat in the last ten seconds.

    Raises:
        redis.RedisError: Redis is unavailable.
    """
    return read_workers(client)


def plan_moves(client: redis.Redis) -> Iterator[Moved]:
    """Yield what `move_names` would move. Changes nothing.

    Raises:
        redis.RedisError: Redis is unavailable, or a key has a value of another type.
    """
    for move in MOVES:
        if count := _size(client, move):
            yield Moved(move.old, move.new, count)
    for old, new in OLD_COUNTERS.items():
        value: Any = client.hget(COUNTERS, old)
        if value is not None:
            yield Moved(f"{COUNTERS} {old}", f"{COUNTERS} {new}", _number(value))
    for key in DROPPED:
        if client.exists(key):
            yield Moved(key, "", 1)


def move_names(client: redis.Redis) -> Iterator[Moved]:
    """Move everything that is under an old name; yield each key once nothing of it is left there.

    Workers of neither version may run. Each portion is one step of the server, so what is interrupted can be repeated,
    and two runs at the same time do no harm.

    Raises:
        redis.RedisError: Redis is unavailable, or a key has a value of another type, which stays where it is.
    """
    move_key = load_script(client, "move_key", package="shiwu.broker.migration")
    move_counter = load_script(client, "move_counter", package="shiwu.broker.migration")
    for move in MOVES:
        count = kept = 0
        left = 1
        while left:
            moved, left, repeated = move_key(keys=[move.old, move.new], args=[move.type, MAX_MOVED])
            count, kept = count + moved, kept + repeated
        if count:
            yield Moved(move.old, move.new, count, kept)
    for old, new in OLD_COUNTERS.items():
        value: bytes = move_counter(keys=[COUNTERS], args=[old, new])
        if value:
            yield Moved(f"{COUNTERS} {old}", f"{COUNTERS} {new}", _number(value))
    for key in DROPPED:
        if client.unlink(key):
            yield Moved(key, "", 1)


def _size(client: redis.Redis, move: Move) -> int:
    size: int = getattr(client, _SIZES[move.type])(move.old)
    return size


def _number(value: bytes) -> int:
    return int(value) if value.isdigit() else 0
