"""How long the workers need for what waits: from the answers of the last minute."""

from __future__ import annotations

from collections import deque
from typing import Final

from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane

RATE_WINDOW_MS: Final = 60_000.0


class BacklogEstimator:
    """Estimates how long all workers need for the backlog, from the answers of the last minute."""

    def __init__(self) -> None:
        self._answered: deque[tuple[float, int]] = deque()
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
        while self._answered[0][0] < snapshot.at_ms - RATE_WINDOW_MS:
            self._answered.popleft()
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
