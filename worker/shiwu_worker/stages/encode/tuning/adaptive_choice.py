"""A choice among a few ordered ways to work, made again and again from what they are seen to cost.

Of ways that cost about the same the smallest is taken. The others are tried now and then with real work; the time that
this wastes is a bounded share of the time worked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.tuning.relative_costs import RelativeCosts

Reason = Literal["cheaper", "as_cheap_and_smaller", "not_allowed"]
CHANGE_AT: Final = math.log(1.02)
"""What another way must save, beyond what may be chance."""
EQUAL: Final = math.log(1.01)
"""A way that costs so little more than the cheapest is as good."""
WASTED: Final = 0.02
"""Share of the time worked that tries of other ways may waste."""
CREDIT_S: Final = 0.25
"""What they may waste before any work was done."""
MAX_CREDIT_S: Final = 5.0
EARLY: Final = 64
"""Measurements during which every second one may be a try."""
LATER_EVERY: Final = 4
"""From then on it is every fourth at most."""
SURE: Final = 0.25
"""Standard deviations of an estimate that count as chance, for the first change; each further one asks for as many
more, so that ways that cost the same do not take turns."""
CALM: Final = 500
"""Measurements after which a change is forgotten."""
HOPE: Final = 1.5
"""Standard deviations that an estimate may be wrong by: a way that could then be chosen is worth a try."""
NEAR: Final = 4
"""A way that was never measured waits for its round where its try is more than so many times as much work."""
FIRST_ROUND: Final = 16
"""Measurements after which a way is tried again however dear it looked; each try makes it a third more."""
ROUND_GROWTH: Final = 1.3
LAST_ROUND: Final = 64
STALE_S: Final = 600.0
"""The same in seconds, for a worker with little to do."""
MAX_WASTE: Final = 0.3
"""A try is expected to take so much longer than the current way at most, however dear it looked: that may have been a
disturbance. What a try really wasted is counted when it is done, and no other one begins before it is made good."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another way is taken from now on."""

    before: int
    now: int
    reason: Reason


class AdaptiveChoice:
    """Chooses one of its arms: `record` teaches it, `next_try` says what it wants to know. Pure; not thread-safe.

    Args:
        guesses: arm → first guess of its cost for one unit of work, and the standard deviation of its logarithm.
        first: the arm to begin with.
    """

    def __init__(self, guesses: Mapping[int, tuple[float, float]], *, first: int) -> None:
        self.costs = RelativeCosts(guesses)
        self.current = first
        self._arms = tuple(sorted(guesses))
        self._allowed = frozenset(self._arms)
        self._credit_s = CREDIT_S
        self._records = self._tried_at = 0
        self._rounds = {arm: (0, float(FIRST_ROUND)) for arm in self._arms}
        """Arm → at which record it was tried last, and after how many it is tried again."""
        self._not_before_s: dict[int, float] = {}
        self._changed_at: deque[int] = deque()

    @property
    def allowed(self) -> Collection[int]:
        """The arms that may be taken now."""
        return self._allowed

    def allow(self, arms: Collection[int]) -> Change | None:
        """Take none but these from now on; one at least."""
        self._allowed = frozenset(arms)
        if self.current in self._allowed:
            return None
        smaller = [arm for arm in self._allowed if arm < self.current]
        return self._change(max(smaller) if smaller else min(self._allowed), "not_allowed")

    def postpone(self, arm: int, until_s: float) -> None:
        """Do not try this arm before then: there was no work for it."""
        self._not_before_s[arm] = until_s

    def next_try(self, now_s: float, *, unit_s: float, units: Mapping[int, float]) -> int | None:
        """The arm that should do the next work; None: the current one, for a try would tell or cost the wrong amount.

        Args:
            unit_s: seconds that one unit of work takes the current arm.
            units: arm → how much work it does in one try.
        """
        every = 2 if self._records < EARLY else LATER_EVERY
        if self._records - self._tried_at < every:
            return None
        others = [arm for arm in self._allowed if arm != self.current and now_s >= self._not_before_s.get(arm, 0.0)]
        near = [arm for arm in others if units[arm] <= NEAR * units[self.current] or self.costs.is_known(arm)]
        hopeful = sorted((arm for arm in near if self._may_win(arm)), key=self._at_best)
        due = sorted((arm for arm in others if self._is_due(arm, now_s)), key=lambda arm: self._rounds[arm][0])
        # The longest due goes first, and a hopeful one instead while there is no credit for it: hope ends with a few
        # tries. Other due ones wait, or cheap ones would always spend what a dear one needs. Tries that should cost
        # nothing need no credit, for without them a debt of a worker with quick batches keeps it where it is.
        free = [arm for arm in dict.fromkeys((*hopeful, *due)) if self._less(arm, self.current) <= 0]
        paid = [*due[:1], *hopeful]
        can_pay = [arm for arm in paid if self._waste_s(arm, unit_s * units[arm]) <= self._credit_s]
        arm = next(iter((*can_pay, *free)), None)
        if arm is not None:
            self._tried_at = self._records
            self._rounds[arm] = (self._records, min(LAST_ROUND, self._rounds[arm][1] * ROUND_GROWTH))
        return arm

    def _may_win(self, arm: int) -> bool:
        if self.costs.is_surprising(arm):
            return True
        if arm > self.current:
            return self._at_best(arm) < self.costs.log_cost(self.current) - CHANGE_AT
        return self._at_best(arm) < self.costs.log_cost(self._cheapest()) + EQUAL

    def _at_best(self, arm: int) -> float:
        return self.costs.log_cost(arm) - HOPE * self.costs.sd(arm, self.current)

    def _is_due(self, arm: int, now_s: float) -> bool:
        tried_at, round_ = self._rounds[arm]
        return self._records - tried_at >= round_ or now_s - self.costs.seen_s(arm) > STALE_S

    def _waste_s(self, arm: int, seconds: float) -> float:
        """How much longer a try is expected to take than the same work by the current arm, which takes `seconds`."""
        more = self.costs.log_cost(arm) - self.costs.log_cost(self.current) + self.costs.sd(arm, self.current)
        return seconds * min(MAX_WASTE, math.expm1(max(0.0, more)))

    def record(self, arm: int, cost: float, *, seconds: float, now_s: float, wasted_s: float = 0.0) -> Change | None:
        """Learn from work that was done.

        Args:
            cost: of one unit of it.
            seconds: that all of it took.
            wasted_s: how much longer it took than the current arm would have, where `next_try` had asked for it.
        """
        self._records += 1
        self.costs.observe(arm, cost, now_s)
        self._credit_s = min(MAX_CREDIT_S, self._credit_s + WASTED * seconds) - wasted_s
        return self._choose()

    def _less(self, arm: int, other: int) -> float:
        return self.costs.log_cost(arm) - self.costs.log_cost(other)

    def _candidates(self) -> list[int]:
        return [arm for arm in self._arms if arm in self._allowed and (arm == self.current or self.costs.is_known(arm))]

    def _cheapest(self) -> int:
        return min(self._candidates(), key=self.costs.log_cost)

    def _choose(self) -> Change | None:
        while self._changed_at and self._records - self._changed_at[0] > CALM:
            self._changed_at.popleft()
        sure = SURE * (1 + len(self._changed_at))
        best = self._cheapest()
        smallest = min(arm for arm in self._candidates() if self._less(arm, best) <= EQUAL)
        if self._less(self.current, best) > CHANGE_AT + sure * self.costs.sd(best, self.current):
            return self._change(smallest, "cheaper")
        if (
            smallest < self.current
            and self._less(smallest, best) + max(1.0, sure) * self.costs.sd(smallest, self.current) <= EQUAL
        ):
            return self._change(smallest, "as_cheap_and_smaller")
        return None

    def _change(self, arm: int, reason: Reason) -> Change:
        if reason != "not_allowed":
            self._changed_at.append(self._records)
        change = Change(self.current, arm, reason)
        self.current = arm
        return change
