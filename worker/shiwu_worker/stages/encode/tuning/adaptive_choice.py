"""Chooses one of a few ordered arms (ways to do the same work), again and again, from their measured costs.

Among arms that cost about the same, the smallest is chosen. The other arms are tried now and then with real work; the
time that this wastes is a bounded share of the time worked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.tuning.relative_costs import RelativeCosts

Reason = Literal["cheaper", "as_cheap_and_smaller", "not_allowed"]
MIN_GAIN: Final = math.log(1.02)
"""Log saving that another arm must bring, in addition to what may be chance."""
EQUAL_COST: Final = math.log(1.01)
"""Log difference up to which an arm counts as being as cheap as the cheapest."""
WASTE_SHARE: Final = 0.02
"""Share of the time worked that tries of other arms may waste."""
CREDIT_S: Final = 0.25
"""What tries may waste before any work was done."""
MAX_CREDIT_S: Final = 5.0
EARLY_RECORDS: Final = 64
"""Number of first records during which every second one may be a try."""
LATE_TRY_INTERVAL: Final = 4
"""After them, at most every fourth one is a try."""
CHANGE_SDS: Final = 0.25
"""Standard deviations of an estimate that count as chance, for the first change. Each further change needs as many
more, so that arms that cost the same do not take turns."""
CHANGE_MEMORY: Final = 500
"""Records after which a change is forgotten."""
OPTIMISM_SDS: Final = 1.5
"""Standard deviations by which an estimate may be wrong: an arm that could then be chosen is worth a try."""
NEAR_FACTOR: Final = 4
"""An arm that was never measured waits until it is due if its try is more than this many times as much work."""
FIRST_RETRY_RECORDS: Final = 16
"""Records after which an arm is tried again even if it looked expensive; each try makes it a third more."""
RETRY_GROWTH: Final = 1.3
MAX_RETRY_RECORDS: Final = 64
MAX_ESTIMATE_AGE_S: Final = 600.0
"""Age after which an estimate is renewed by a try, for a worker with little to do."""
MAX_WASTE: Final = 0.3
"""Upper limit of the expected waste of a try, as a share of its work, even if the arm looked expensive: that may have
been a disturbance. The real waste is counted when the try is done, and no other try begins before it is made up for."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another arm is used from now on."""

    before: int
    now: int
    reason: Reason


class AdaptiveChoice:
    """Chooses one of its arms: `record` adds a measurement, `next_try` names the arm to measure next.

    Pure; not thread-safe.

    Args:
        guesses: arm → first estimate of its cost for one unit of work, and the standard deviation of its logarithm.
        first: the arm to begin with.
    """

    def __init__(self, guesses: Mapping[int, tuple[float, float]], *, first: int) -> None:
        self.costs = RelativeCosts(guesses)
        self.current = first
        self._arms = tuple(sorted(guesses))
        self._allowed = frozenset(self._arms)
        self._credit_s = CREDIT_S
        self._records = self._tried_at = 0
        self._retries = {arm: (0, float(FIRST_RETRY_RECORDS)) for arm in self._arms}
        """Arm → the record at which it was tried last, and the number of records after which it is tried again."""
        self._not_before_s: dict[int, float] = {}
        self._changed_at: deque[int] = deque()

    @property
    def allowed(self) -> Collection[int]:
        """The arms that may be used now."""
        return self._allowed

    def allow(self, arms: Collection[int]) -> Change | None:
        """Use only these arms from now on; at least one."""
        self._allowed = frozenset(arms)
        if self.current in self._allowed:
            return None
        smaller = [arm for arm in self._allowed if arm < self.current]
        return self._change(max(smaller) if smaller else min(self._allowed), "not_allowed")

    def postpone(self, arm: int, until_s: float) -> None:
        """Do not try this arm before `until_s`, because there was not enough work for it."""
        self._not_before_s[arm] = until_s

    def next_try(self, now_s: float, *, unit_s: float, units: Mapping[int, float]) -> int | None:
        """The arm to try with the next work; None for the current arm, if no try is worth its cost now.

        Args:
            unit_s: seconds that one unit of work takes the current arm.
            units: arm → how much work one try of it does.
        """
        every = 2 if self._records < EARLY_RECORDS else LATE_TRY_INTERVAL
        if self._records - self._tried_at < every:
            return None
        others = [arm for arm in self._allowed if arm != self.current and now_s >= self._not_before_s.get(arm, 0.0)]
        near = [arm for arm in others if units[arm] <= NEAR_FACTOR * units[self.current] or self.costs.is_known(arm)]
        promising = sorted((arm for arm in near if self._may_win(arm)), key=self._at_best)
        due = sorted((arm for arm in others if self._is_due(arm, now_s)), key=lambda arm: self._retries[arm][0])
        # The arm that is due longest goes first; while there is no credit for it, a promising one goes instead, which
        # ends after a few tries. Other due arms wait: cheap ones would always spend what an expensive one needs. Tries
        # that should cost nothing need no credit, so that a debt does not keep a worker with fast batches where it is.
        free = [arm for arm in dict.fromkeys((*promising, *due)) if self._log_ratio(arm, self.current) <= 0]
        paid = [*due[:1], *promising]
        can_pay = [arm for arm in paid if self._waste_s(arm, unit_s * units[arm]) <= self._credit_s]
        arm = next(iter((*can_pay, *free)), None)
        if arm is not None:
            self._tried_at = self._records
            self._retries[arm] = (self._records, min(MAX_RETRY_RECORDS, self._retries[arm][1] * RETRY_GROWTH))
        return arm

    def _may_win(self, arm: int) -> bool:
        if self.costs.is_surprising(arm):
            return True
        if arm > self.current:
            return self._at_best(arm) < self.costs.log_cost(self.current) - MIN_GAIN
        return self._at_best(arm) < self.costs.log_cost(self._cheapest()) + EQUAL_COST

    def _at_best(self, arm: int) -> float:
        return self.costs.log_cost(arm) - OPTIMISM_SDS * self.costs.sd(arm, self.current)

    def _is_due(self, arm: int, now_s: float) -> bool:
        tried_at, retry_records = self._retries[arm]
        return self._records - tried_at >= retry_records or now_s - self.costs.seen_s(arm) > MAX_ESTIMATE_AGE_S

    def _waste_s(self, arm: int, seconds: float) -> float:
        """How much longer a try should take than the same work by the current arm, which takes `seconds`."""
        more = self.costs.log_cost(arm) - self.costs.log_cost(self.current) + self.costs.sd(arm, self.current)
        return seconds * min(MAX_WASTE, math.expm1(max(0.0, more)))

    def record(self, arm: int, cost: float, *, seconds: float, now_s: float, wasted_s: float = 0.0) -> Change | None:
        """Learn from finished work.

        Args:
            cost: of one unit of the work.
            seconds: how long all of it took.
            wasted_s: how much longer a try took than the current arm would have; 0 for other work.
        """
        self._records += 1
        self.costs.observe(arm, cost, now_s)
        self._credit_s = min(MAX_CREDIT_S, self._credit_s + WASTE_SHARE * seconds) - wasted_s
        return self._choose()

    def _log_ratio(self, arm: int, other: int) -> float:
        return self.costs.log_cost(arm) - self.costs.log_cost(other)

    def _candidates(self) -> list[int]:
        return [arm for arm in self._arms if arm in self._allowed and (arm == self.current or self.costs.is_known(arm))]

    def _cheapest(self) -> int:
        return min(self._candidates(), key=self.costs.log_cost)

    def _choose(self) -> Change | None:
        while self._changed_at and self._records - self._changed_at[0] > CHANGE_MEMORY:
            self._changed_at.popleft()
        chance_sds = CHANGE_SDS * (1 + len(self._changed_at))
        best = self._cheapest()
        smallest = min(arm for arm in self._candidates() if self._log_ratio(arm, best) <= EQUAL_COST)
        if self._log_ratio(self.current, best) > MIN_GAIN + chance_sds * self.costs.sd(best, self.current):
            return self._change(smallest, "cheaper")
        if (
            smallest < self.current
            and self._log_ratio(smallest, best) + max(1.0, chance_sds) * self.costs.sd(smallest, self.current)
            <= EQUAL_COST
        ):
            return self._change(smallest, "as_cheap_and_smaller")
        return None

    def _change(self, arm: int, reason: Reason) -> Change:
        if reason != "not_allowed":
            self._changed_at.append(self._records)
        change = Change(self.current, arm, reason)
        self.current = arm
        return change
