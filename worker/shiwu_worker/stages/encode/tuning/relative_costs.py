"""Which of a few ways to do the same work costs least, learned by comparing neighbours in time.

A machine's speed changes by a third within a minute, for every way alike. So no absolute time is kept: a measurement is
compared with those of another way just before and just after it, and only the difference is learned. What slows all of
them cancels out, and so does a steady drift.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

SIDE: Final = 2
"""Neighbours that are looked at, before and after a measurement."""
NEAR_S: Final = 5.0
"""Measurements further apart are no neighbours."""
NOISE_SD: Final = 0.3
"""Standard deviation of the logarithm of one measurement, until it is known."""
MIN_NOISE_SD: Final = 0.01
NOISE_GAIN: Final = 0.05
"""What one more difference between measurements of the same way counts for the noise, once there were many."""
MEDIAN_NOISE: Final = 1.5
"""Variance of a median of n measurements, times n, in variances of one of them."""
DRIFT_PER_S: Final = 0.01 / 60
"""Variance that an estimate gains in each second until its way is measured again: a standard deviation of 0.1 after a
minute."""
LARGEST_SD: Final = 1.0
OUTLIER: Final = 1.5
"""Standard deviations beyond which a difference is an outlier and counts as no more than so many."""


@dataclass(slots=True)
class _Estimate:
    log_cost: float
    variance: float
    seen: int = 0
    seen_s: float = -math.inf
    compared: int = 0
    outlier: float = 0.0
    """The last difference from what was expected, if it was an outlier. A second one in its direction confirms it."""


@dataclass(frozen=True, slots=True)
class _Measurement:
    arm: int
    log_cost: float
    at_s: float


class RelativeCosts:
    """Estimates of the cost of one unit of work by each way ("arm"): a Kalman filter for each. Pure; not thread-safe.

    The arm that was measured most often is the reference: its estimate stays, and the others learn from it. So only
    differences between estimates mean something.

    Args:
        guesses: arm → first guess of its cost, and the standard deviation of the guess's logarithm.
    """

    def __init__(self, guesses: Mapping[int, tuple[float, float]]) -> None:
        self._of = {arm: _Estimate(math.log(cost), sd * sd) for arm, (cost, sd) in guesses.items()}
        self._noise_variance = NOISE_SD**2
        self._repeated = 0
        self._recent: deque[_Measurement] = deque(maxlen=2 * SIDE + 1)

    def log_cost(self, arm: int) -> float:
        """The logarithm of the estimated cost, to be compared with those of other arms."""
        return self._of[arm].log_cost

    def sd(self, arm: int, other: int) -> float:
        """Standard deviation of the difference of the two logarithms."""
        return 0.0 if arm == other else math.sqrt(self._of[arm].variance + self._of[other].variance)

    def is_known(self, arm: int) -> bool:
        """Whether it was ever compared with another; otherwise there is only the guess."""
        return self._of[arm].compared > 0

    def is_surprising(self, arm: int) -> bool:
        """Whether its last measurement was an outlier, which another one may confirm."""
        return self._of[arm].outlier != 0

    def seen_s(self, arm: int) -> float:
        """When it was measured last; minus infinity: never."""
        return self._of[arm].seen_s

    def forget(self, sd: float) -> None:
        """The surroundings have changed: no estimate is more certain than this."""
        for one in self._of.values():
            one.variance = max(one.variance, sd * sd)

    def observe(self, arm: int, cost: float, now_s: float) -> None:
        """Take one measurement, and learn from the one that has now all its neighbours."""
        newest = _Measurement(arm, math.log(cost), now_s)
        if self._recent and self._recent[-1].arm == arm and now_s - self._recent[-1].at_s <= NEAR_S:
            self._learn_noise(newest.log_cost - self._recent[-1].log_cost)
        self._recent.append(newest)
        here = self._of[arm]
        if here.seen:
            here.variance = min(LARGEST_SD**2, here.variance + DRIFT_PER_S * (now_s - here.seen_s))
        here.seen += 1
        here.seen_s = now_s
        if here.seen == max(one.seen for one in self._of.values()):
            here.variance = 0.0
        if len(self._recent) > SIDE:
            self._compare(self._recent[-1 - SIDE])

    def _learn_noise(self, difference: float) -> None:
        self._repeated += 1
        gain = max(NOISE_GAIN, 1 / (3 + self._repeated))
        seen = min(difference * difference / 2, OUTLIER**2 * self._noise_variance)
        self._noise_variance += gain * (seen - self._noise_variance)
        self._noise_variance = max(MIN_NOISE_SD**2, self._noise_variance)

    def _compare(self, measured: _Measurement) -> None:
        """Learn from this measurement and its neighbours of that other arm which was measured most often."""
        others = [one for one in self._recent if one.arm != measured.arm and abs(one.at_s - measured.at_s) <= NEAR_S]
        if not others:
            return
        here = self._of[measured.arm]
        reference = max((one.arm for one in others), key=lambda arm: self._of[arm].seen)
        there = self._of[reference]
        if there.seen < here.seen:
            return
        level = [one.log_cost for one in others if one.arm == reference]
        expected = median(level) + here.log_cost - there.log_cost
        self._learn(here, measured.log_cost - expected, noise=self._noise_variance * (1 + MEDIAN_NOISE / len(level)))

    @staticmethod
    def _learn(here: _Estimate, error: float, *, noise: float) -> None:
        here.compared += 1
        most = OUTLIER * math.sqrt(here.variance + noise)
        before, here.outlier = here.outlier, 0.0
        if abs(error) > most:
            if before * error > 0:
                # Twice in the same direction: it has changed, by what both of them say.
                most = max(most, min(abs(before), abs(error)))
                here.variance = max(here.variance, most**2)
            else:
                here.outlier = error
            error = max(-most, min(most, error))
        gain = here.variance / (here.variance + noise)
        here.log_cost += gain * error
        here.variance *= 1 - gain
