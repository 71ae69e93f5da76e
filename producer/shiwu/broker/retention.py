"""How much is kept, and for how long: the operator's word, given to the workers and left in Redis for everybody else.

A producer that cancels and a sweep write answers and trim as well; with limits of their own they would throw away what
the operator wants kept.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import redis

from shiwu.contract import RETENTION

RESULT_TTL_S: Final = 86_400
DONE_TTL_S: Final = 2 * 86_400
DEAD_LENGTH: Final = 10_000
DEAD_AGE_S: Final = 14 * 86_400
STREAM_LENGTH: Final = 100_000
REFRESH_S: Final = 60.0
_ALL: Final = 10**12


@dataclass(frozen=True, slots=True)
class Retention:
    """Times in seconds; lengths in entries."""

    result_ttl_s: int = RESULT_TTL_S
    """An answer can be read under its key."""
    done_ttl_s: int = DONE_TTL_S
    """An id counts as answered; longer than any redelivery can take."""
    dead_length: int = DEAD_LENGTH
    dead_age_s: int = DEAD_AGE_S
    stream_length: int = STREAM_LENGTH


DEFAULT_RETENTION: Final = Retention()
KEEP_ALL: Final = Retention(dead_length=_ALL, dead_age_s=_ALL // 100, stream_length=_ALL)
"""Where no worker has left its limits: the usual times, and nothing is thrown away."""


class PublishedRetention:
    """What the workers have left in Redis, looked up once a minute. Raises redis.RedisError when Redis is away.

    Where it may not be read (an ACL without that key), what is known stays.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._known = KEEP_ALL
        self._read_s = -REFRESH_S

    def __call__(self) -> Retention:
        """The limits now."""
        if time.monotonic() - self._read_s >= REFRESH_S:
            with contextlib.suppress(redis.ResponseError):
                self._known = self._read()
            self._read_s = time.monotonic()
        return self._known

    def _read(self) -> Retention:
        found: Any = self._client.hgetall(RETENTION)
        values = {name.decode(errors="replace"): value for name, value in found.items()}
        known = {one.name: int(values[one.name]) for one in fields(Retention) if values.get(one.name, b"").isdigit()}
        return Retention(**(asdict(KEEP_ALL) | known))


class RetentionPublisher:
    """A worker's own limits, told to all others through Redis once a minute. Raises redis.RedisError if it is away."""

    def __init__(self, client: redis.Redis, keep: Retention) -> None:
        self._client = client
        self._keep = keep
        self._told_s = -REFRESH_S

    def __call__(self) -> Retention:
        """The limits; they are told on the way."""
        if time.monotonic() - self._told_s >= REFRESH_S:
            mapping: dict[Any, Any] = asdict(self._keep)
            # A full server refuses this write, and must not thereby end the upkeep that frees memory.
            with contextlib.suppress(redis.ResponseError):
                self._client.hset(RETENTION, mapping=mapping)
            self._told_s = time.monotonic()
        return self._keep
