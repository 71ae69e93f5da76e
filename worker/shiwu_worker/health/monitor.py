"""Liveness and readiness of this worker, with the reasons if it is not live or not ready.

A worker is not live if a restart may help: it has work and makes no progress, or a part of it has ended. It is not
ready if a job would not be answered now, which a restart may not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from shiwu_worker.runtime.proc import is_running
from shiwu_worker.runtime.progress import Progress
from shiwu_worker.runtime.threads import ServiceThread

REDIS_EXTRA_S: Final = 3.0
"""Redis counts as available for its time-out plus this after its last reply; the heartbeat calls it each second."""
MAX_WITHOUT_LOADERS_S: Final = 5.0
"""Longest time without a running loader; a crashed loader is replaced well within it."""


@dataclass(frozen=True, slots=True)
class LivenessSources:
    """What the monitor reads from a worker that has started.

    Args:
        threads: the threads that must run.
        held: how many jobs the worker holds.
        encode_age_s: seconds since the encode thread last completed its loop, with or without a batch.
        loaders: process ids of the loaders.
        stuck_s: after this time with work and without progress the worker counts as stuck.
    """

    threads: Collection[ServiceThread]
    held: Callable[[], int]
    encode_age_s: Callable[[], float]
    loaders: Callable[[], Collection[int]]
    stuck_s: Callable[[], float]


class HealthMonitor:
    """Collects the state of all parts. Thread-safe: each report is one assignment.

    Args:
        progress: of the pipeline. It does not count time without Redis as stuck; the monitor does if work waits.
        redis_timeout_s: time-out of one Redis command.
        is_waiting_for_revokes: whether the worker claims and does not receive Celery's broadcasts yet.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        redis_timeout_s: float,
        is_waiting_for_revokes: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._is_waiting_for_revokes = is_waiting_for_revokes
        self._progress = progress
        self._redis_slack_s = redis_timeout_s + REDIS_EXTRA_S
        self._began_s = self._clock()
        self._sources: LivenessSources | None = None
        self._waiting = 0
        self._redis_s = self._clock()
        self._is_redis_unavailable = False
        self._away_shards = self._shards = 0
        self._is_claiming = self._is_stopping = False
        self._canary = ""
        self._loaders_s = 0.0
        """When the last probe that found a running loader was."""

    # -------------------------------------------------------------------------------- reports
    def started(self, sources: LivenessSources) -> None:
        """Report that all parts run."""
        self._redis_s = self._loaders_s = self._clock()
        self._sources = sources

    def stopping(self) -> None:
        """Report that the worker drains. From now on the grace time limits it, and it counts as live."""
        self._is_stopping = True

    def claiming(self, *, active: bool) -> None:
        """Report that claims succeed, or no longer do."""
        self._is_claiming = active

    def redis(self, *, available: bool) -> None:
        """Report that Redis answered the heartbeat, or did not."""
        self._is_redis_unavailable = not available
        if available:
            self._redis_s = self._clock()

    def shards_away(self, away: int, *, of: int) -> None:
        """Report how many of the shards do not answer."""
        self._away_shards, self._shards = away, of

    def waiting(self, messages: int) -> None:
        """Report how many messages the last queue snapshot found in the lanes."""
        self._waiting = messages

    def canary(self, wrong: str) -> None:
        """Report what is wrong with the vector of the health-check image."""
        self._canary = wrong

    # -------------------------------------------------------------------------------- probes
    def not_live(self) -> list[str]:
        """Return why an orchestrator should restart this worker; empty while it is live or drains.

        A worker that starts is not live yet; a start-up probe limits how long that may take.
        """
        if self._is_stopping:
            return []
        sources = self._sources
        if sources is None:
            return [f"starting for {self._clock() - self._began_s:.0f} s"]
        reasons, stuck_s = [], sources.stuck_s()
        if missing := sorted(thread.name for thread in sources.threads if not thread.is_alive):
            reasons.append(f"threads have ended: {', '.join(missing)}")
        if (age_s := sources.encode_age_s()) > stuck_s:
            reasons.append(f"the encode thread has been busy with one batch for {age_s:.0f} s")
        if (absent_s := self._without_loaders_s(sources)) > min(MAX_WITHOUT_LOADERS_S, stuck_s):
            reasons.append(f"no loader process has run for {absent_s:.0f} s")
        if work := self._work(sources):
            if (idle_s := self._progress.age_s()) > stuck_s:
                reasons.append(f"nothing was claimed, encoded or answered for {idle_s:.0f} s {work}")
            if (silent_s := self._redis_silent_s()) > stuck_s:
                reasons.append(f"Redis has not answered for {silent_s:.0f} s {work}")
        return reasons

    def not_ready(self) -> list[str]:
        """Return why a job would not be answered now; empty if the worker is ready."""
        # First, and also while the worker drains because of it: the operator must see this reason.
        wrong = [f"the health-check image got a wrong result: {self._canary}"] if self._canary else []
        if self._is_stopping:
            return [*wrong, "draining"]
        reasons = [*wrong, *self.not_live()]
        if self._sources is None:
            return reasons
        if self._is_redis_unavailable or self._redis_silent_s() > self._redis_slack_s:
            reasons.append(f"Redis has not answered for {self._redis_silent_s():.0f} s")
        if self._away_shards > self._shards / 2:
            reasons.append(f"{self._away_shards} of {self._shards} shards do not answer")
        if not self._is_claiming:
            reasons.append("no claim has succeeded yet, or the last one failed")
        elif self._is_waiting_for_revokes():
            reasons.append("Celery's broadcasts are not received yet: a revoke would be lost")
        return reasons

    def stalled_s(self) -> float:
        """Return for how long there has been work without progress; 0 without work, while starting and draining."""
        sources = self._sources
        if sources is None or self._is_stopping or not self._work(sources):
            return 0.0
        silent_s = self._redis_silent_s()
        return max(self._progress.age_s(), silent_s if silent_s > self._redis_slack_s else 0.0)

    def _work(self, sources: LivenessSources) -> str:
        held, waiting = sources.held(), self._waiting
        return f"with {held} jobs held and {waiting} waiting" if held or waiting else ""

    def _redis_silent_s(self) -> float:
        return self._clock() - self._redis_s

    def _without_loaders_s(self, sources: LivenessSources) -> float:
        now_s = self._clock()
        if any(is_running(pid) for pid in sources.loaders()):
            self._loaders_s = now_s
        return now_s - self._loaders_s
