"""Rates and histories of the lanes, from the queue snapshots of the last five minutes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Final

from shiwu.broker.backlog import BacklogEstimator
from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane
from shiwu.top.look import LaneLook

HISTORY_MS: Final = 300_000.0
STEP_MS: Final = 5_000.0
"""Step of a history."""
RATE_MS: Final = 15_000.0
"""Rates are those of about so long."""


class LaneRates:
    """Keeps snapshots and derives rates from them. Used by one thread."""

    def __init__(self) -> None:
        self._snapshots: deque[QueueSnapshot] = deque()
        self._estimator = BacklogEstimator()
        self._backlog_s: dict[Lane, float] = {}

    def add(self, snapshot: QueueSnapshot) -> None:
        """Take in a snapshot; one that is known already changes nothing."""
        if self._snapshots:
            newest = self._snapshots[-1]
            if newest.at_ms == snapshot.at_ms:
                return
            if snapshot.at_ms < newest.at_ms or snapshot.answered < newest.answered:
                # Another server, or a database that was emptied.
                self._snapshots.clear()
                self._estimator = BacklogEstimator()
        self._snapshots.append(snapshot)
        # One older than the history is kept, because a history begins with what was known at its beginning.
        while len(self._snapshots) > 1 and self._snapshots[1].at_ms < snapshot.at_ms - HISTORY_MS:
            self._snapshots.popleft()
        self._backlog_s = self._estimator.backlog_s(snapshot)

    def answers_per_s(self) -> float | None:
        """Answers of all lanes each second; None until two snapshots are known."""
        before, now = self._span()
        return None if before is None else (now.answered - before.answered) / _seconds(before, now)

    def lanes(self, *, now_ms: float, answered: Iterable[Lane]) -> tuple[LaneLook, ...]:
        """The lanes as the newest snapshot counts them.

        Args:
            now_ms: Redis' clock.
            answered: lanes of the newest answers, by which the rate of all answers is divided.
        """
        counts = Counter(answered)
        total = self.answers_per_s()
        return tuple(self._look(lane, now_ms=now_ms, out_per_s=_part(total, counts, lane)) for lane in Lane)

    def _look(self, lane: Lane, *, now_ms: float, out_per_s: float | None) -> LaneLook:
        before, now = self._span()
        in_per_s = None
        if before is not None and out_per_s is not None:
            grown = _held(now, lane) - _held(before, lane)
            in_per_s = max(0.0, round(grown / _seconds(before, now) + out_per_s, 1))
        oldest_ms = now.oldest_ms.get(lane)
        return LaneLook(
            lane=lane,
            waiting=now.waiting.get(lane, 0),
            claimed=now.claimed.get(lane, 0),
            in_per_s=in_per_s,
            out_per_s=None if out_per_s is None else round(out_per_s, 1),
            oldest_s=None if oldest_ms is None else max(0.0, round((now_ms - oldest_ms) / 1000, 1)),
            backlog_s=round(self._backlog_s.get(lane, 0.0), 1),
            history=self._history(lane, now_ms=now_ms),
        )

    def _span(self) -> tuple[QueueSnapshot | None, QueueSnapshot]:
        """The newest snapshot, and the newest of those that are old enough for a rate; else the oldest, if another."""
        now = self._snapshots[-1]
        before = None
        for snapshot in self._snapshots:
            if snapshot is now or (before is not None and snapshot.at_ms > now.at_ms - RATE_MS):
                break
            before = snapshot
        return before, now

    def _history(self, lane: Lane, *, now_ms: float) -> tuple[int, ...]:
        found: list[int] = []
        known = iter(self._snapshots)
        following: QueueSnapshot | None = next(known, None)
        waiting: int | None = None
        steps = int(HISTORY_MS / STEP_MS)
        for step in range(steps):
            until_ms = now_ms - (steps - 1 - step) * STEP_MS
            while following is not None and following.at_ms <= until_ms:
                waiting = following.waiting.get(lane, 0)
                following = next(known, None)
            if waiting is not None:
                found.append(waiting)
        return tuple(found)


def _held(snapshot: QueueSnapshot, lane: Lane) -> int:
    return snapshot.waiting.get(lane, 0) + snapshot.claimed.get(lane, 0)


def _seconds(before: QueueSnapshot, now: QueueSnapshot) -> float:
    return max(0.001, (now.at_ms - before.at_ms) / 1000)


def _part(total: float | None, counts: Counter[Lane], lane: Lane) -> float | None:
    """The part of a lane; None where answers are counted and no lane of one is known."""
    if not total:
        return total
    known = sum(counts.values())
    return total * counts[lane] / known if known else None
