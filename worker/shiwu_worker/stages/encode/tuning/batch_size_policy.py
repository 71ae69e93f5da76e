"""Chooses how large batches are, and learns it from real batches for as long as the worker runs.

The start gives a first estimate. From then on each batch shows what its size costs. Sizes that may be better, or that
did not run for a while, get a real batch when enough images wait. Sizes are excluded if their batches would take too
long, or if the device ran out of memory with them a short while ago.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.batch_sizes import plan_batches
from shiwu_worker.stages.encode.tuning.adaptive_choice import AdaptiveChoice, Change

MAX_BATCH_S: Final = 1.0
"""A size is used only if its batches are expected to take less."""
LEAVE_FACTOR: Final = 1.3
"""A size in use is left when its batches take this many times as long as the limit."""
GUESSED_SD: Final = 0.35
"""Standard deviation of the logarithm of the cost of a size that was not measured."""
FIXED_PART: Final = 0.25
"""Share of the smallest batch's cost that does not depend on its images, if no other batch was measured."""
TIME_GAIN: Final = 0.2
"""Weight of one batch in the estimate of how fast the machine is now."""
MAX_LOG_CHANGE: Final = math.log(2)
"""Largest change that one batch makes to that estimate, because the batch may have been disturbed."""
TRY_TIMEOUT_S: Final = 10.0
"""Longest wait of a try for enough images, and then for its result."""
TRY_PAUSE_S: Final = 60.0
MEMORY_PAUSE_S: Final = 300.0
"""How long sizes are excluded after the device ran out of memory; doubles each time it happens again."""
BRIEF_BATCH_S: Final = 0.025
"""How long the batches of `brief` take at most."""
FIRST_TOLERANCE: Final = 1.03
"""The first size may cost this many times as much per image as the best one, because its latency is lower."""
MAX_MEMORY_PAUSE_S: Final = 6 * 3600.0
REPORT_EVERY_S: Final = 10.0
PLAN_SHIFT: Final = 0.02
"""Change in the logarithm of a cost after which the plan for waiting images is computed again."""

Reason = Literal["cheaper", "as_cheap_and_smaller", "too_long", "out_of_memory"]


@dataclass(frozen=True, slots=True)
class BatchSizeChange:
    """The size of the largest batch has changed."""

    before: int
    now: int
    reason: Reason
    images_per_s: float
    """Expected throughput at the new size."""


@dataclass(slots=True)
class _Try:
    """A size that gets the next batch for which enough images wait."""

    size: int
    since_s: float
    is_running: bool = False


class BatchSizePolicy:
    """Chooses the size of the largest batch, and how many waiting images a batch takes.

    Thread-safe; no method waits. The cost of a batch may be in any unit: core-seconds, or seconds of the device.

    Args:
        sizes: allowed batch sizes, ascending.
        measured: size → cost of one batch, as measured before the first image; at least one size.
        measured_sd: standard deviation of the logarithms of these costs.
        cost_per_s: cost of one second of a running batch: the number of cores that work on it, or 1.
        first: the largest batch to begin with; None lets the measured costs decide.
        max_batch_s: sizes whose batches take longer are excluded.
        on_change: called when the largest batch has changed, at most every ten seconds; must not block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        measured: Mapping[int, float],
        *,
        measured_sd: float,
        cost_per_s: float = 1.0,
        first: int | None = None,
        max_batch_s: float = MAX_BATCH_S,
        on_change: Callable[[BatchSizeChange], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sizes = tuple(sizes)
        self._max_batch_s = max_batch_s
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        guesses = guess_costs(self._sizes, measured)
        sds = {size: measured_sd if size in measured else GUESSED_SD for size in self._sizes}
        per_image = {size: (guesses[size], sds[size]) for size in self._sizes}
        self._choice = AdaptiveChoice(per_image, first=self._sizes[0])
        self._slowness = -math.log(cost_per_s)
        """Logarithm of the seconds that a unit of cost took recently."""
        self._memory_limit = _MemoryLimit()
        self._trying: _Try | None = None
        fitting = self._fitting()
        self._choice.current = first or largest_useful({size: guesses[size] for size in fitting})
        self._choice.allow(fitting)
        self._reason: Reason = "cheaper"
        self._reported, self._reported_s = self._choice.current, -math.inf
        self._planned: dict[int, float] = {}
        self._plan: tuple[int, ...] = ()
        self._brief = self._sizes[0]
        self._update_plan()

    # -------------------------------------------------------------------------------- the choice
    @property
    def largest(self) -> int:
        """The largest batch, as chosen now."""
        return self._choice.current

    @property
    def wanted(self) -> int:
        """How many images should be able to wait: the largest batch, or a larger one that is to be tried."""
        trying = self._trying
        return self._choice.current if trying is None else max(self._choice.current, trying.size)

    @property
    def brief(self) -> int:
        """The largest of these batches that takes up to BRIEF_BATCH_S now, or the smallest size."""
        return self._brief

    def take(self, waiting: int) -> int:
        """How many of the `waiting` images the next batch takes; at least one if one waits."""
        with self._lock:
            return self._next_try(waiting) or self._plan[min(waiting, self._choice.current)]

    def seconds(self) -> dict[int, float]:
        """Size → seconds that one of its batches is expected to take now."""
        with self._lock:
            return {size: self._seconds(size) for size in self._sizes}

    @property
    def slowest_s(self) -> float:
        """Seconds that the largest batch is expected to take now."""
        with self._lock:
            return self._seconds(self._choice.current)

    @property
    def quickest_s(self) -> float:
        """Seconds that the smallest batch is expected to take now."""
        with self._lock:
            return self._seconds(self._sizes[0])

    def cost_of(self, size: int) -> float:
        """The cost of a batch of this size; only comparisons with other sizes mean something."""
        with self._lock:
            return size * math.exp(self._choice.costs.log_cost(size))

    def _next_try(self, waiting: int) -> int | None:
        """The size that the next batch tries, if one is to be tried and enough images wait for it."""
        now_s = self._clock()
        if (trying := self._trying) is None:
            unit_s = self._seconds(self._choice.current) / self._choice.current
            size = self._choice.next_try(now_s, unit_s=unit_s, units={size: float(size) for size in self._sizes})
            if size is None:
                return None
            trying = self._trying = _Try(size, now_s)
        if trying.is_running or waiting < trying.size:
            if now_s - trying.since_s > TRY_TIMEOUT_S:
                self._choice.postpone(trying.size, now_s + TRY_PAUSE_S)
                self._trying = None
            return None
        trying.is_running, trying.since_s = True, now_s
        return trying.size

    # -------------------------------------------------------------------------------- learning
    def record(self, size: int, *, cost: float, seconds: float) -> None:
        """Learn from a batch that was run at this size."""
        with self._lock:
            now_s = self._clock()
            trying = self._trying
            wasted_s = 0.0
            if trying is not None and trying.is_running and trying.size == size:
                self._trying = None
                wasted_s = max(0.0, seconds - size * self._seconds(self._choice.current) / self._choice.current)
            slower = math.log(seconds / size) - self._choice.costs.log_cost(size) - self._slowness
            self._slowness += TIME_GAIN * max(-MAX_LOG_CHANGE, min(MAX_LOG_CHANGE, slower))
            change = self._choice.record(size, cost / size, seconds=seconds, now_s=now_s, wasted_s=wasted_s)
            report = self._apply_limits(change, now_s)
        if report is not None:
            self._on_change(report)

    def skip(self, size: int) -> None:
        """Ignore a batch of this size: the first one, which also paid for warming up."""
        with self._lock:
            if self._trying is not None and self._trying.size == size:
                self._trying.is_running = False

    def forget(self) -> None:
        """Treat what was learned as a first estimate again, because the model now runs in another way."""
        with self._lock:
            self._choice.costs.forget(GUESSED_SD)

    def lower(self, largest: int) -> None:
        """Make no batches larger than this for a while, because the device ran out of memory."""
        with self._lock:
            now_s = self._clock()
            self._memory_limit.lower(max(self._sizes[0], largest), now_s)
            self._trying = None
            report = self._apply_limits(None, now_s)
        if report is not None:
            self._on_change(report)

    def _apply_limits(self, change: Change | None, now_s: float) -> BatchSizeChange | None:
        """Keep the choice within the limits of memory and time; returns a change to report, if any."""
        if change is not None and change.reason != "not_allowed":
            self._reason = change.reason
        is_short = self._choice.current > self._memory_limit.max_size(now_s)
        if self._choice.allow(self._fitting()) is not None:
            self._reason = "out_of_memory" if is_short else "too_long"
        self._update_plan()
        now, reported = self._choice.current, self._reported
        if now == reported or now_s - self._reported_s < REPORT_EVERY_S:
            return None
        self._reported, self._reported_s = now, now_s
        return BatchSizeChange(reported, now, self._reason, images_per_s=round(now / self._seconds(now), 1))

    def _fitting(self) -> list[int]:
        """The sizes within the limits of memory and time; always includes the smallest."""
        smallest, *others = self._sizes
        max_size = self._memory_limit.max_size(self._clock())
        fitting = [smallest, *(size for size in others if size <= max_size)]
        # Estimates vary a little all the time, so a size in use is not left as soon as it takes a little longer.
        limits_s = {
            size: self._max_batch_s * (LEAVE_FACTOR if size <= self._choice.current else 1.0) for size in fitting
        }
        return [size for size in fitting if size == smallest or self._seconds(size) <= limits_s[size]]

    def _seconds(self, size: int) -> float:
        return size * math.exp(self._choice.costs.log_cost(size) + self._slowness)

    def _update_plan(self) -> None:
        sizes = [size for size in self._sizes if size <= self._choice.current]
        # Kept, because the batcher asks at each image.
        self._brief = max((size for size in sizes if self._seconds(size) <= BRIEF_BATCH_S), default=self._sizes[0])
        costs = {size: self._choice.costs.log_cost(size) for size in self._sizes if size <= self._choice.current}
        has_other_sizes = costs.keys() != self._planned.keys()
        if has_other_sizes or any(abs(cost - self._planned[size]) > PLAN_SHIFT for size, cost in costs.items()):
            self._planned = costs
            plan = plan_batches({size: size * math.exp(cost) for size, cost in costs.items()})
            # The largest size is chosen by stricter rules than comparing two close estimates, so it stays as chosen.
            self._plan = (*plan[:-1], self._choice.current)


class _MemoryLimit:
    """The largest size for which there was memory, and until when no larger one is tried."""

    def __init__(self) -> None:
        self._max_size = math.inf
        self._until_s = -math.inf
        self._pause_s = MEMORY_PAUSE_S

    def max_size(self, now_s: float) -> float:
        """The largest size that may be run."""
        return self._max_size if now_s < self._until_s else math.inf

    def lower(self, size: int, now_s: float) -> None:
        """Exclude sizes above this one for a while."""
        if now_s >= self._until_s:
            self._max_size, self._until_s = size, now_s + self._pause_s
            self._pause_s = min(MAX_MEMORY_PAUSE_S, 2 * self._pause_s)
        self._max_size = min(self._max_size, size)


def guess_costs(sizes: Sequence[int], measured: Mapping[int, float]) -> dict[int, float]:
    """The cost of an image in a batch of each size, from the measured costs of some sizes.

    For the other sizes a batch is assumed to have a fixed cost, and the same cost for each image.
    """
    smallest, largest = min(measured), max(measured)
    if smallest == largest:
        fixed = FIXED_PART * measured[smallest]
        by_image = (measured[smallest] - fixed) / smallest
    else:
        by_image = (measured[largest] - measured[smallest]) / (largest - smallest)
        # A disturbed measurement must not give images a cost of zero or less.
        by_image = min(max(by_image, measured[largest] / largest / 2), measured[largest] / largest)
        fixed = measured[largest] - largest * by_image
    return {size: measured[size] / size if size in measured else fixed / size + by_image for size in sizes}


def largest_useful(per_image: Mapping[int, float]) -> int:
    """The smallest size at which an image costs about as little as at any; larger ones bring no more throughput."""
    least = min(per_image.values())
    return min(size for size, cost in per_image.items() if cost <= FIRST_TOLERANCE * least)
