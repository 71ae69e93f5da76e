"""Retention: how much is kept and for how long. Workers publish their settings in Redis for clients and sweeps.

A cancelling client and a sweep write answers and trim as well. With limits of their own they would drop what the
operator of the workers wants to keep.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import redis

from shiwu.broker.steps import Steps, run
from shiwu.contract import RETENTION

RESULT_TTL_S: Final = 86_400
DONE_TTL_S: Final = 2 * 86_400
DEAD_LENGTH: Final = 10_000
DEAD_AGE_S: Final = 14 * 86_400
STREAM_LENGTH: Final = 100_000
STREAM_BYTES: Final = 256 * 1024 * 1024
DEAD_BYTES: Final = 256 * 1024 * 1024
REFRESH_S: Final = 60.0
_UNLIMITED: Final = 10**12
_LONGEST_S: Final = 10 * 366 * 86_400
_BOUNDS: Final = {
    "result_ttl_s": (60, _LONGEST_S),
    "done_ttl_s": (60, _LONGEST_S),
    "dead_length": (100, _UNLIMITED),
    "dead_age_s": (60, _UNLIMITED // 100),
    "stream_length": (1000, _UNLIMITED),
    "stream_bytes": (1024 * 1024, _UNLIMITED),
    "dead_bytes": (1024 * 1024, _UNLIMITED),
    "old_marks": (0, 1),
}
"""Field → least and largest value that is believed, as in the settings of a worker. A wrong one could lose answers."""
_MAX_DIGITS: Final = 18


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept and for how long: times in seconds, lengths in entries, sizes in bytes of Redis' memory."""

    result_ttl_s: int = RESULT_TTL_S
    """How long an answer can be read under its key."""
    done_ttl_s: int = DONE_TTL_S
    """How long an id counts as answered, so that duplicates are recognised; at least `result_ttl_s`."""
    dead_length: int = DEAD_LENGTH
    """How many dead letters are kept; the oldest are dropped."""
    dead_age_s: int = DEAD_AGE_S
    """How long a dead letter is kept."""
    stream_length: int = STREAM_LENGTH
    """How many answers the results stream keeps."""
    stream_bytes: int = STREAM_BYTES
    """How large the results stream may be; the oldest answers are dropped."""
    dead_bytes: int = DEAD_BYTES
    """How large the dead letters may be together; the oldest are dropped."""
    old_marks: int = 1
    """1: marks of answered ids are also read and written in the form of versions before `shiwu.contract.MARKS`."""


DEFAULT_RETENTION: Final = Retention()
KEEP_ALL: Final = Retention(
    dead_length=_UNLIMITED,
    dead_age_s=_UNLIMITED // 100,
    stream_length=_UNLIMITED,
    stream_bytes=_UNLIMITED,
    dead_bytes=_UNLIMITED,
)
"""Used while no worker has published its limits: the default times, and nothing is dropped."""


class PublishedRetention:
    """The limits that workers have published in Redis, read once a minute. Call it to get them.

    The last known limits stay in use where the user of Redis may not read the key. Raises redis.RedisError while Redis
    is unavailable.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._limits = RetentionSteps()

    def __call__(self) -> Retention:
        """The published limits, at most a minute old."""
        return run(self._client, self._limits.read_steps())


class RetentionSteps:
    """Asks for the limits that workers have published, once a minute."""

    def __init__(self) -> None:
        self._known = KEEP_ALL
        self._read_s = -REFRESH_S

    def read_steps(self) -> Steps[Retention]:
        """The published limits, at most a minute old."""
        if time.monotonic() - self._read_s >= REFRESH_S:
            with contextlib.suppress(redis.ResponseError):
                found = yield lambda client: client.hgetall(RETENTION)
                self._known = _read_retention(found)
            self._read_s = time.monotonic()
        return self._known


def _read_retention(found: Mapping[bytes, bytes]) -> Retention:
    values = {name.decode(errors="replace"): value for name, value in found.items()}
    known = {name: _bounded(name, values[name]) for name in _BOUNDS if values.get(name, b"").isdigit()}
    return Retention(**(asdict(KEEP_ALL) | known))


def _bounded(name: str, value: bytes) -> int:
    least, most = _BOUNDS[name]
    return most if len(value) > _MAX_DIGITS else min(max(int(value), least), most)


class RetentionPublisher:
    """Publishes a worker's limits in Redis once a minute. Call it to get them.

    Raises redis.RedisError while Redis is unavailable.
    """

    def __init__(self, client: redis.Redis, retention: Retention) -> None:
        self._client = client
        self._retention = retention
        self._published_s = -REFRESH_S

    def __call__(self) -> Retention:
        """The limits; publishes them if that is due."""
        if time.monotonic() - self._published_s >= REFRESH_S:
            mapping: dict[Any, Any] = asdict(self._retention)
            # A full server refuses this write, which must not end the maintenance that frees memory.
            with contextlib.suppress(redis.ResponseError):
                self._client.hset(RETENTION, mapping=mapping)
            self._published_s = time.monotonic()
        return self._retention
