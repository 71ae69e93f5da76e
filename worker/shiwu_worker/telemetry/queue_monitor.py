"""Looks at the queues and the card every few seconds, for the numbers that Prometheus is told and for the probes."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis import RedisError

from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane

log: Any = structlog.get_logger()
SNAPSHOT_EVERY_S: Final = 5.0
RATE_WINDOW_S: Final = 60.0


class BacklogEstimator:
    """How many jobs all workers answer in a second while work waits, and how long what waits will take them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=int(RATE_WINDOW_S / SNAPSHOT_EVERY_S) + 1)
        self._since_ms: dict[Lane, float] = {}

    def backlog_s(self, seen: QueueSnapshot) -> dict[Lane, float]:
        """Seconds until each lane is empty. Interactive goes first, so bulk waits for both.

        A pace counts only while something waits: workers that idle could do more. Before there is one, and where nobody
        answers anything, it is the age of the backlog: it will last at least as long again.
        """
        if not any(seen.waiting.values()):
            self._seen.clear()
        if not self._seen or self._seen[-1][0] < seen.at_ms:
            self._seen.append((seen.at_ms, seen.answered))
        (from_ms, before), (until_ms, after) = self._seen[0], self._seen[-1]
        rate = (after - before) / (until_ms - from_ms) * 1000 if until_ms > from_ms else 0.0
        ahead, found = 0, {}
        for lane in Lane:
            ahead += seen.waiting[lane]
            if not seen.waiting[lane]:
                self._since_ms.pop(lane, None)
                found[lane] = 0.0
            elif rate > 0:
                found[lane] = ahead / rate
            else:
                since_ms = self._since_ms.setdefault(lane, seen.at_ms)
                found[lane] = (seen.at_ms - min(since_ms, seen.oldest_ms.get(lane, since_ms))) / 1000
        return found


class QueueMonitor:
    """A thread, from `start` to `close`; whatever fails here costs numbers and no job.

    Args:
        snapshot: the queues, not older than `SNAPSHOT_EVERY_S`.
        on_snapshot: told them, with the seconds of backlog in each lane.
        on_redis_unavailable: called each time Redis did not answer.
        before_each: called each time, for what else is worth a look.
    """

    def __init__(
        self,
        snapshot: Callable[[], QueueSnapshot],
        *,
        on_snapshot: Callable[[QueueSnapshot, dict[Lane, float]], None],
        on_redis_unavailable: Callable[[], None] = lambda: None,
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        self._snapshot = snapshot
        self._on_snapshot = on_snapshot
        self._on_redis_unavailable = on_redis_unavailable
        self._before_each = before_each
        self._backlog = BacklogEstimator()
        self._has_failed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue-monitor", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            began_s = time.monotonic()
            try:
                self._before_each()
                seen = self._snapshot()
                self._on_snapshot(seen, self._backlog.backlog_s(seen))
                self._has_failed = False
            except (RedisError, OSError):
                self._on_redis_unavailable()  # the heartbeat logs that Redis is away
            except Exception as error:  # border: numbers are not worth a worker
                if not self._has_failed:
                    log.exception("queue_monitor_failed", error=str(error)[:300])
                self._has_failed = True
            # Not all workers at the same moment: the first one's look serves the others.
            self._closed.wait(max(0.1, SNAPSHOT_EVERY_S * random.uniform(0.8, 1.0) - (time.monotonic() - began_s)))  # noqa: S311 no secret
