"""Which shards answer this worker, as its threads find out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from redis import RedisError

from shiwu.broker.redis_errors import classify, info_of
from shiwu_worker.runtime.backoff import LOG_INTERVAL_S, RedisBackoff

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()


class ShardHealth:
    """A shard is away while one of the threads that use it has failed and not succeeded since. Thread-safe.

    A shard that goes away is logged once, and an error that does not pass by itself every 30 s.

    Args:
        count: number of shards.
        on_change: called with a shard, and whether it is away now; under the lock, so it must not block.
    """

    def __init__(self, count: int, *, on_change: Callable[[int, bool], None] = lambda *_: None) -> None:
        self.count = count
        self._on_change = on_change
        self._lock = threading.Lock()
        self._failing: dict[int, set[str]] = {}
        """Shard → the threads that fail there."""
        self._since_s: dict[int, float] = {}
        self._logged_s: dict[int, float] = {}

    @property
    def away(self) -> int:
        """How many shards are away."""
        return len(self._failing)

    def is_away(self, shard: int) -> bool:
        """Whether this shard is away."""
        return shard in self._failing

    def failed(self, shard: int, where: str, error: RedisError) -> None:
        """Report that a thread got this error from a shard."""
        info, now_s = info_of(error), time.monotonic()
        with self._lock:
            is_new = shard not in self._failing
            self._failing.setdefault(shard, set()).add(where)
            if is_new:
                self._since_s[shard] = now_s
                self._on_change(shard, True)
            elif info.is_temporary or now_s - self._logged_s[shard] < LOG_INTERVAL_S:
                return
            self._logged_s[shard] = now_s
        log.error(
            "shard_away",
            shard=shard,
            where=where,
            away=self.away,
            of=self.count,
            code=classify(error).value,
            kind=type(error).__name__,
            error=str(error)[:300],
            meaning=info.meaning,
            remedy=info.remedy,
        )

    def succeeded(self, shard: int, where: str) -> None:
        """Report that a thread whose commands failed got a reply again."""
        with self._lock:
            failing = self._failing.get(shard)
            if failing is None:
                return
            failing.discard(where)
            if failing:
                return
            del self._failing[shard]
            after_s = time.monotonic() - self._since_s.pop(shard)
            self._on_change(shard, False)
        log.info("shard_back", shard=shard, after_s=round(after_s, 3), away=self.away, of=self.count)


class ShardBackoff(RedisBackoff):
    """The pauses of one thread that uses one shard; reported to the health of the shards instead of logged."""

    def __init__(
        self, where: str, *, shard: int, health: ShardHealth, on_wait: Callable[[RedisError], None] = lambda _: None
    ) -> None:
        super().__init__(where, on_wait=on_wait)
        self._shard = shard
        self._health = health

    def wait(self, error: RedisError, stop: threading.Event) -> None:
        """Pause before the next try, or until `stop` is set."""
        self._health.failed(self._shard, self._where, error)
        self._on_wait(error)
        stop.wait(self._backoff.next_s())

    def reset(self) -> None:
        """Note that a try succeeded."""
        if self._backoff.is_waiting:
            self._backoff.reset()
            self._health.succeeded(self._shard, self._where)
