"""Learns which arm (way to do the same work) costs least, by comparing measurements that are neighbours in time.

A machine's speed changes by a third within a minute, for all arms alike. So no absolute time is kept: a measurement is
compared with those of another arm just before and just after it, and only the difference is learned. What slows all of
them cancels out, and so does a steady drift.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

NEIGHBOURS: Final = 2
"""Number of neighbours before and after a measurement that are compared with it."""
NEIGHBOUR_S: Final = 5.0
"""Longest time between neighbours."""
NOISE_SD: Final = 0.3
"""Standard deviation of the logarithm of one measurement, until it is known."""
MIN_NOISE_SD: Final = 0.01
NOISE_GAIN: Final = 0.05
"""Least weight of one more difference between measurements of the same arm in the estimate of the noise."""
MEDIAN_NOISE: Final = 1.5
"""Variance of a median of n measurements, times n, in variances of one of them."""
DRIFT_PER_S: Final = 0.01 / 60
"""Variance that an estimate gains per second until its arm is measured again: a standard deviation of 0.1 after a
minute."""
MAX_SD: Final = 1.0
OUTLIER_SDS: Final = 1.5
"""Standard deviations at which a difference is cut off; a larger one is an outlier."""


@dataclass(slots=True)
class _Estimate:
    log_cost: float
    variance: float
    seen: int = 0
    seen_s: float = -math.inf
    compared: int = 0
    outlier: float = 0.0
    """The last difference from the expected value, if it was an outlier. A second one in its direction confirms it."""


@dataclass(frozen=True, slots=True)
class _Measurement:
    arm: int
    log_cost: float
    at_s: float


class RelativeCosts:
    """Estimates of the cost of one unit of work by each arm, with one Kalman filter per arm. Pure; not thread-safe.

    The arm that was measured most often is the reference: its estimate stays, and the others learn from it. Only
    differences between estimates mean something.

    Args:
        guesses: arm → first estimate of its cost, and the standard deviation of its logarithm.
    """

    def __init__(self, guesses: Mapping[int, tuple[float, float]]) -> None:
        self._estimates = {arm: _Estimate(math.log(cost), sd * sd) for arm, (cost, sd) in guesses.items()}
        self._noise_variance = NOISE_SD**2
        self._repeated = 0
        self._recent: deque[_Measurement] = deque(maxlen=2 * NEIGHBOURS + 1)

    def log_cost(self, arm: int) -> float:
        """The logarithm of the estimated cost; only comparisons with other arms mean something."""
        return self._estimates[arm].log_cost

    def sd(self, arm: int, other: int) -> float:
        """Standard deviation of the difference of the two logarithms."""
        return 0.0 if arm == other else math.sqrt(self._estimates[arm].variance + self._estimates[other].variance)

    def is_known(self, arm: int) -> bool:
        """Whether the arm was ever compared with another; otherwise there is only the first estimate."""
        return self._estimates[arm].compared > 0

    def is_surprising(self, arm: int) -> bool:
        """Whether the last measurement of the arm was an outlier, which another one may confirm."""
        return self._estimates[arm].outlier != 0

    def seen_s(self, arm: int) -> float:
        """When the arm was measured last; minus infinity if never."""
        return self._estimates[arm].seen_s

    def forget(self, sd: float) -> None:
        """Treat no estimate as more certain than `sd`, because the surroundings have changed."""
        for estimate in self._estimates.values():
            estimate.variance = max(estimate.variance, sd * sd)

    def observe(self, arm: int, cost: float, now_s: float) -> None:
        """Add one measurement, and learn from the earlier one whose neighbours are now complete."""
        newest = _Measurement(arm, math.log(cost), now_s)
        if self._recent and self._recent[-1].arm == arm and now_s - self._recent[-1].at_s <= NEIGHBOUR_S:
            self._learn_noise(newest.log_cost - self._recent[-1].log_cost)
        self._recent.append(newest)
        here = self._estimates[arm]
        if here.seen:
            here.variance = min(MAX_SD**2, here.variance + DRIFT_PER_S * (now_s - here.seen_s))
        here.seen += 1
        here.seen_s = now_s
        if here.seen == max(estimate.seen for estimate in self._estimates.values()):
            here.variance = 0.0
        if len(self._recent) > NEIGHBOURS:
            self._compare(self._recent[-1 - NEIGHBOURS])

    def _learn_noise(self, difference: float) -> None:
        self._repeated += 1
        gain = max(NOISE_GAIN, 1 / (3 + self._repeated))
        seen = min(difference * difference / 2, OUTLIER_SDS**2 * self._noise_variance)
        self._noise_variance += gain * (seen - self._noise_variance)
        self._noise_variance = max(MIN_NOISE_SD**2, self._noise_variance)

    def _compare(self, measured: _Measurement) -> None:
        """Learn from a measurement and its neighbours of the other arm that was measured most often."""
        others = [
            other
            for other in self._recent
            if other.arm != measured.arm and abs(other.at_s - measured.at_s) <= NEIGHBOUR_S
        ]
        if not others:
            return
        here = self._estimates[measured.arm]
        reference = max((other.arm for other in others), key=lambda arm: self._estimates[arm].seen)
        there = self._estimates[reference]
        if there.seen < here.seen:
            return
        reference_costs = [other.log_cost for other in others if other.arm == reference]
        expected = median(reference_costs) + here.log_cost - there.log_cost
        self._learn(
            here, measured.log_cost - expected, noise=self._noise_variance * (1 + MEDIAN_NOISE / len(reference_costs))
        )

    @staticmethod
    def _learn(here: _Estimate, error: float, *, noise: float) -> None:
        here.compared += 1
        limit = OUTLIER_SDS * math.sqrt(here.variance + noise)
        before, here.outlier = here.outlier, 0.0
        if abs(error) > limit:
            if before * error > 0:
                # Two outliers in the same direction: the cost has changed, by what both of them show.
                limit = max(limit, min(abs(before), abs(error)))
                here.variance = max(here.variance, limit**2)
            else:
                here.outlier = error
            error = max(-limit, min(limit, error))
        gain = here.variance / (here.variance + noise)
        here.log_cost += gain * error
        here.variance *= 1 - gain
