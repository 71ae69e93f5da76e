"""What the probes are told: whether this worker lives, and whether it is ready, with the reasons where not.

Live is a question of progress and not of running: what a restart may cure. Ready is what a restart need not cure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shiwu_worker.runtime.progress import Progress

READY_SLACK_S: Final = 3.0
"""Redis counts as reachable for so long beyond its time-out after it last answered; the heartbeat asks each second."""
LOADERS_GONE_S: Final = 5.0
"""Loaders that end are replaced well within it."""
STILL: Final = frozenset("TtZXx")
"""States of a process that is stopped, traced or dead, in /proc."""


@dataclass(frozen=True, slots=True)
class LivenessSources:
    """What a worker that has started must have.

    Args:
        threads: names of those that must live.
        held: how many jobs it holds.
        encode_age_s: seconds since the thread that feeds the device came round, with work or without.
        loaders: process ids of its loaders.
        stuck_s: with work and without progress for this long it counts as hung.
    """

    threads: Collection[str]
    held: Callable[[], int]
    encode_age_s: Callable[[], float]
    loaders: Callable[[], Collection[int]]
    stuck_s: Callable[[], float]


class HealthMonitor:
    """Collects signs from all parts. Thread-safe: each sign is one assignment.

    Args:
        progress: of the pipeline. Redis' absence counts there as no hang; here it does, while work is known to wait.
        redis_timeout_s: of one command.
        is_waiting_for_revokes: whether the worker claims, and does not hear Celery's broadcasts yet.
    """

    def __init__(
        self, progress: Progress, *, redis_timeout_s: float, is_waiting_for_revokes: Callable[[], bool] = lambda: False
    ) -> None:
        self._is_waiting_for_revokes = is_waiting_for_revokes
        self._progress = progress
        self._redis_slack_s = redis_timeout_s + READY_SLACK_S
        self._began_s = time.monotonic()
        self._body: LivenessSources | None = None
        self._waiting = 0
        self._redis_s = time.monotonic()
        self._is_redis_away = False
        self._is_claiming = self._is_stopping = False
        self._canary = ""
        self._loaders_s = 0.0
        """When a loader was last seen to run, by whoever asked."""

    # -------------------------------------------------------------------------------- signs
    def started(self, body: LivenessSources) -> None:
        """All parts run."""
        self._redis_s = self._loaders_s = time.monotonic()
        self._body = body

    def stopping(self) -> None:
        """The worker drains; from now on its end is bounded by the grace time and not by us."""
        self._is_stopping = True

    def claiming(self, *, active: bool) -> None:
        """Claims succeed, or have ended."""
        self._is_claiming = active

    def redis(self, *, available: bool) -> None:
        """Redis answered the heartbeat, or did not."""
        self._is_redis_away = not available
        if available:
            self._redis_s = time.monotonic()

    def waiting(self, messages: int) -> None:
        """So many messages were in the lanes when somebody looked last."""
        self._waiting = messages

    def canary(self, wrong: str) -> None:
        """What is wrong with the answer to the known picture."""
        self._canary = wrong

    # -------------------------------------------------------------------------------- verdicts
    def not_live(self) -> list[str]:
        """Why an orchestrator should start this worker anew; empty while it lives or drains.

        One that starts does not live yet: a start-up probe says how long that may take.
        """
        if self._is_stopping:
            return []
        body = self._body
        if body is None:
            return [f"starting for {time.monotonic() - self._began_s:.0f} s"]
        reasons, stuck_s = [], body.stuck_s()
        if missing := sorted(set(body.threads) - {thread.name for thread in threading.enumerate()}):
            reasons.append(f"threads have ended: {', '.join(missing)}")
        if (age_s := body.encode_age_s()) > stuck_s:
            reasons.append(f"the encode thread has been busy with one batch for {age_s:.0f} s")
        if (gone_s := self._loaders_gone_s(body)) > min(LOADERS_GONE_S, stuck_s):
            reasons.append(f"no loader process has run for {gone_s:.0f} s")
        if work := self._work(body):
            if (idle_s := self._progress.age_s()) > stuck_s:
                reasons.append(f"nothing was claimed, encoded or answered for {idle_s:.0f} s {work}")
            if (away_s := self._away_s()) > stuck_s:
                reasons.append(f"Redis has not answered for {away_s:.0f} s {work}")
        return reasons

    def not_ready(self) -> list[str]:
        """Why this worker takes no jobs now; empty when it is warm, right, and claims."""
        # First, and also in the end that it leads to: this is what an operator must see.
        wrong = [f"the known picture got a wrong answer: {self._canary}"] if self._canary else []
        if self._is_stopping:
            return [*wrong, "draining"]
        reasons = [*wrong, *self.not_live()]
        if self._body is None:
            return reasons
        if self._is_redis_away or self._away_s() > self._redis_slack_s:
            reasons.append(f"Redis has not answered for {self._away_s():.0f} s")
        if not self._is_claiming:
            reasons.append("no claim has succeeded yet, or the last one failed")
        elif self._is_waiting_for_revokes():
            reasons.append("Celery's broadcasts are not heard yet: a revoke would be lost")
        return reasons

    def stalled_s(self) -> float:
        """For how long there has been work and nothing has moved; 0 without work, at the start and in the end."""
        body = self._body
        if body is None or self._is_stopping or not self._work(body):
            return 0.0
        away_s = self._away_s()
        return max(self._progress.age_s(), away_s if away_s > self._redis_slack_s else 0.0)

    def _work(self, body: LivenessSources) -> str:
        held, waiting = body.held(), self._waiting
        return f"with {held} jobs held and {waiting} waiting" if held or waiting else ""

    def _away_s(self) -> float:
        return time.monotonic() - self._redis_s

    def _loaders_gone_s(self, body: LivenessSources) -> float:
        now_s = time.monotonic()
        if any(_runs(pid) for pid in body.loaders()):
            self._loaders_s = now_s
        return now_s - self._loaders_s


def _runs(pid: int) -> bool:
    """Whether a process is there and not stopped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # The name before the state may hold blanks and brackets.
    return stat.rpartition(")")[2].split()[0] not in STILL
