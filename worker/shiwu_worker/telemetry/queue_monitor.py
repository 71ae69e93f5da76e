"""Queue monitor thread: takes a queue snapshot every few seconds, for the metrics and the probes."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane
from shiwu_worker.runtime.duties import Duties, Duty
from shiwu_worker.runtime.threads import ServiceThread

SNAPSHOT_EVERY_S: Final = 5.0
RATE_WINDOW_S: Final = 60.0


class BacklogEstimator:
    """Estimates how long all workers need for the backlog, from the answers of the last minute."""

    def __init__(self) -> None:
        self._answered: deque[tuple[float, int]] = deque(maxlen=int(RATE_WINDOW_S / SNAPSHOT_EVERY_S) + 1)
        self._since_ms: dict[Lane, float] = {}

    def backlog_s(self, snapshot: QueueSnapshot) -> dict[Lane, float]:
        """Return the seconds until each lane is empty. The bulk lane also waits for the interactive one.

        The rate counts only while messages wait, because idle workers could do more. Without a rate, the result is the
        age of the backlog, since it will last at least as long again.
        """
        if not any(snapshot.waiting.values()):
            self._answered.clear()
        if not self._answered or self._answered[-1][0] < snapshot.at_ms:
            self._answered.append((snapshot.at_ms, snapshot.answered))
        (from_ms, before), (until_ms, after) = self._answered[0], self._answered[-1]
        rate = (after - before) / (until_ms - from_ms) * 1000 if until_ms > from_ms else 0.0
        ahead, backlog_s = 0, {}
        for lane in Lane:
            ahead += snapshot.waiting[lane]
            if not snapshot.waiting[lane]:
                self._since_ms.pop(lane, None)
                backlog_s[lane] = 0.0
            elif rate > 0:
                backlog_s[lane] = ahead / rate
            else:
                since_ms = self._since_ms.setdefault(lane, snapshot.at_ms)
                backlog_s[lane] = (snapshot.at_ms - min(since_ms, snapshot.oldest_ms.get(lane, since_ms))) / 1000
        return backlog_s


class QueueMonitor:
    """Runs a thread from `start` to `close`. A failure costs metrics and never a job.

    Args:
        snapshot: returns the state of the queues, at most `SNAPSHOT_EVERY_S` old.
        on_snapshot: called with it, and with the seconds of backlog of each lane.
        on_redis_unavailable: called each time Redis did not answer.
        before_each: called before each snapshot.
        on_failed: called with `gpu` or `queue_metrics` when one of the two failed.
    """

    def __init__(
        self,
        snapshot: Callable[[], QueueSnapshot],
        *,
        on_snapshot: Callable[[QueueSnapshot, dict[Lane, float]], None],
        on_redis_unavailable: Callable[[], None] = lambda: None,
        before_each: Callable[[], None] = lambda: None,
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._snapshot = snapshot
        self._on_snapshot = on_snapshot
        self._on_redis_unavailable = on_redis_unavailable
        self._backlog = BacklogEstimator()
        self._duties = Duties(
            [Duty("gpu", before_each), Duty("queue_metrics", self._take_snapshot)], on_failed=on_failed
        )
        self._closed = threading.Event()
        self._thread = ServiceThread("queue-monitor", self._run, on_fatal=None, stop=self._closed.set)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; waits up to a second."""
        self._thread.close(1.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            began_s = time.monotonic()
            if self._duties.run() is not None:
                self._on_redis_unavailable()  # the heartbeat logs it
            # Jitter, so that one worker takes the snapshot and the others read it.
            self._closed.wait(max(0.1, SNAPSHOT_EVERY_S * random.uniform(0.8, 1.0) - (time.monotonic() - began_s)))  # noqa: S311 no secret

    def _take_snapshot(self) -> None:
        snapshot = self._snapshot()
        self._on_snapshot(snapshot, self._backlog.backlog_s(snapshot))
