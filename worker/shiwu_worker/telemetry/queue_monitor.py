"""Queue monitor thread: takes a queue snapshot every few seconds, for the metrics and the probes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

from shiwu.broker.backlog import BacklogEstimator
from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane
from shiwu_worker.runtime.duties import Duties, Duty
from shiwu_worker.runtime.threads import ServiceThread

SNAPSHOT_EVERY_S: Final = 5.0


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
