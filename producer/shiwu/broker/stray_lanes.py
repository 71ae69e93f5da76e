"""Finds lists that look like lanes and that no worker reads.

A client with a `global_keyprefix`, another `sep`, other `priority_steps` or another database number writes to such
lists, and its messages wait forever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import redis

from shiwu.broker.connection import run_on_connection
from shiwu.contract import WORKERS, Lane

MAX_FOUND: Final = 20
"""Lists that one search returns."""
SCAN_COUNT: Final = 1000
"""Keys that Redis examines in one SCAN."""
_LANE_KEYS: Final = frozenset(key for lane in Lane for key in lane.keys)


@dataclass(frozen=True, slots=True)
class StrayLane:
    """A list with messages that no worker of this database reads."""

    key: str
    database: int
    messages: int

    def __str__(self) -> str:
        return f"{self.key!r} in database {self.database} holds {self.messages} messages"


@dataclass(frozen=True, slots=True)
class StrayLanes:
    """The result of one search."""

    found: tuple[StrayLane, ...] = ()
    is_complete: bool = True
    """False where the time limit ended the search, or the user of Redis may not search."""


def find_stray_lanes(client: redis.Redis, *, limit_s: float = 2.0) -> StrayLanes:
    """Search the keys of this database, and the lanes of other databases where no worker runs.

    Args:
        limit_s: the search of the keys ends after this time.

    Raises:
        redis.RedisError: Redis is unavailable. A refused command only makes the search incomplete.
    """
    until_s = time.monotonic() + limit_s
    found: list[StrayLane] = []
    is_complete = True
    own = int(client.get_connection_kwargs().get("db") or 0)
    try:
        found += _in_other_databases(client, own=own)
    except redis.ResponseError:
        is_complete = False
    try:
        for name in _names_like_lanes(client):
            if len(found) >= MAX_FOUND or time.monotonic() >= until_s:
                is_complete = False
                break
            if name is not None:
                length: Any = client.llen(name)
                found.append(StrayLane(name.decode(errors="backslashreplace"), own, length))
    except redis.ResponseError:
        is_complete = False
    return StrayLanes(tuple(found), is_complete=is_complete)


def _names_like_lanes(client: redis.Redis) -> Iterator[bytes | None]:
    """Yield names of lists that contain the name of a lane but are no lane; None after each step of the search."""
    cursor = 0
    while True:
        reply: Any = client.scan(cursor, match="*shiwu.*", count=SCAN_COUNT, _type="list")
        cursor, names = reply
        for name in names:
            text = name.decode(errors="replace")
            if text not in _LANE_KEYS and any(lane.queue in text for lane in Lane):
                yield name
        yield None
        if cursor == 0:
            return


def _in_other_databases(client: redis.Redis, *, own: int) -> list[StrayLane]:
    info: Any = client.info("keyspace")
    others = [int(name[2:]) for name in info if name.startswith("db") and name[2:].isdecimal()]
    found = []
    keys = sorted(_LANE_KEYS)
    for database in others:
        if database == own:
            continue
        with client.client() as connected:  # type: ignore[no-untyped-call]  # redis' own
            # Select the own database again in the same step, because the connection returns to its pool.
            counts = (("ZCARD", WORKERS), *(("LLEN", key) for key in keys))
            _, workers, *lengths, _ = run_on_connection(connected, ("SELECT", database), *counts, ("SELECT", own))
        if not workers:
            found += [StrayLane(key, database, n) for key, n in zip(keys, lengths, strict=True) if n]
    return found
