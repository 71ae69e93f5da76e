"""How large batches are: learned from real batches for as long as the worker runs.

The start gives a first guess. From then on each batch teaches what a size costs; sizes that may be better, or that were
not run for a while, get a real batch when enough images wait. Sizes whose batches would take too long, or for which the
device had no memory a short while ago, are left out.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.batch_sizes import next_batches
from shiwu_worker.stages.encode.tuning.adaptive_choice import AdaptiveChoice, Change

LONGEST_S: Final = 1.0
"""A size is taken where its batches are expected to take less."""
TOO_LONG: Final = 1.3
"""It is left again when they take so many times as long."""
GUESSED_SD: Final = 0.35
"""Of the logarithm of the cost of a size that was not measured."""
FIXED_PART: Final = 0.25
"""Share of the smallest batch's cost that is the batch's and not its image's, where no other batch was measured."""
TIME_GAIN: Final = 0.2
"""What one batch counts for how quick the machine is now."""
MAX_SLOWER: Final = math.log(2)
"""What one batch may say about that at most: it may have been disturbed."""
TRY_WAITS_S: Final = 10.0
"""How long a try waits for enough images, and for its result."""
TRY_AGAIN_S: Final = 60.0
MEMORY_S: Final = 300.0
"""Sizes for which there was no memory are left out for so long, and for twice as long each time it happens again."""
ABOUT: Final = 1.03
"""The first choice may cost so many times as much as the best guess, for the lower latency."""
LONGEST_MEMORY_S: Final = 6 * 3600.0
REPORT_EVERY_S: Final = 10.0
PLAN_SHIFT: Final = 0.02
"""How waiting images are cut into batches is computed again when the cost of a size has changed by so much."""

Reason = Literal["cheaper", "as_cheap_and_smaller", "too_long", "out_of_memory"]


@dataclass(frozen=True, slots=True)
class BatchSizeChange:
    """The largest batch is another one now."""

    before: int
    now: int
    reason: Reason
    images_per_s: float
    """That the new size is expected to do."""


@dataclass(slots=True)
class _Try:
    """A size that gets the next batch for which enough images wait."""

    size: int
    since_s: float
    is_running: bool = False


class BatchSizePolicy:
    """Thread-safe; nothing in it waits. A batch's cost may be in any unit: core-seconds, or seconds of the device.

    Args:
        sizes: that may be run, ascending.
        measured: size → cost of one batch, as measured before the first image; one size at least.
        measured_sd: standard deviation of the logarithms of these.
        cost_per_s: how much cost a second of a running batch holds: cores that work on it, or 1.
        first: the largest batch to begin with; None: as the measured costs say.
        longest_s: sizes whose batches take longer are left out.
        on_change: told that the largest batch has changed, at most every ten seconds; must not block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        measured: Mapping[int, float],
        *,
        measured_sd: float,
        cost_per_s: float = 1.0,
        first: int | None = None,
        longest_s: float = LONGEST_S,
        on_change: Callable[[BatchSizeChange], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sizes = tuple(sizes)
        self._longest_s = longest_s
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        guesses = guess_costs(self._sizes, measured)
        sds = {size: measured_sd if size in measured else GUESSED_SD for size in self._sizes}
        per_image = {size: (guesses[size], sds[size]) for size in self._sizes}
        self._choice = AdaptiveChoice(per_image, first=self._sizes[0])
        self._slowness = -math.log(cost_per_s)
        """Logarithm of the seconds that a unit of cost took lately."""
        self._memory = _Memory()
        self._trying: _Try | None = None
        fitting = self._fitting()
        self._choice.current = first or first_choice({size: guesses[size] for size in fitting})
        self._choice.allow(fitting)
        self._reason: Reason = "cheaper"
        self._told, self._told_s = self._choice.current, -math.inf
        self._planned: dict[int, float] = {}
        self._plan: tuple[int, ...] = ()
        self._renew_plan()

    # -------------------------------------------------------------------------------- what to do
    @property
    def largest(self) -> int:
        """The largest batch, as chosen now."""
        return self._choice.current

    @property
    def wanted(self) -> int:
        """So many images should be able to wait: for the largest batch, or for a larger one that is to be tried."""
        trying = self._trying
        return self._choice.current if trying is None else max(self._choice.current, trying.size)

    def take(self, waiting: int) -> int:
        """How many of so many waiting images the next batch takes; at least one where one waits."""
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

    def cost_of(self, size: int) -> float:
        """The cost of such a batch, to be compared with that of other sizes only."""
        with self._lock:
            return size * math.exp(self._choice.costs.log_cost(size))

    def _next_try(self, waiting: int) -> int | None:
        """The size that the next batch is to try, where enough images wait for it."""
        now_s = self._clock()
        if (trying := self._trying) is None:
            unit_s = self._seconds(self._choice.current) / self._choice.current
            size = self._choice.next_try(now_s, unit_s=unit_s, units={size: float(size) for size in self._sizes})
            if size is None:
                return None
            trying = self._trying = _Try(size, now_s)
        if trying.is_running or waiting < trying.size:
            if now_s - trying.since_s > TRY_WAITS_S:
                self._choice.postpone(trying.size, now_s + TRY_AGAIN_S)
                self._trying = None
            return None
        trying.is_running, trying.since_s = True, now_s
        return trying.size

    # -------------------------------------------------------------------------------- what was seen
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
            self._slowness += TIME_GAIN * max(-MAX_SLOWER, min(MAX_SLOWER, slower))
            change = self._choice.record(size, cost / size, seconds=seconds, now_s=now_s, wasted_s=wasted_s)
            told = self._settle(change, now_s)
        if told is not None:
            self._on_change(told)

    def skip(self, size: int) -> None:
        """A batch of this size was run that says nothing: it was the first one, which pays for more than itself."""
        with self._lock:
            if self._trying is not None and self._trying.size == size:
                self._trying.is_running = False

    def forget(self) -> None:
        """The model runs in another way now: what was learned is a first guess again."""
        with self._lock:
            self._choice.costs.forget(GUESSED_SD)

    def lower(self, largest: int) -> None:
        """There was no memory for more than so many: make no larger batches for a while."""
        with self._lock:
            now_s = self._clock()
            self._memory.lower(max(self._sizes[0], largest), now_s)
            self._trying = None
            told = self._settle(None, now_s)
        if told is not None:
            self._on_change(told)

    def _settle(self, change: Change | None, now_s: float) -> BatchSizeChange | None:
        """Keep the choice within memory and time; returns what is to be told."""
        if change is not None and change.reason != "not_allowed":
            self._reason = change.reason
        is_short = self._choice.current > self._memory.most(now_s)
        if self._choice.allow(self._fitting()) is not None:
            self._reason = "out_of_memory" if is_short else "too_long"
        self._renew_plan()
        now, said = self._choice.current, self._told
        if now == said or now_s - self._told_s < REPORT_EVERY_S:
            return None
        self._told, self._told_s = now, now_s
        return BatchSizeChange(said, now, self._reason, images_per_s=round(now / self._seconds(now), 1))

    def _fitting(self) -> list[int]:
        """The sizes for which there are memory and time; the smallest always."""
        smallest, *others = self._sizes
        most = self._memory.most(self._clock())
        fitting = [smallest, *(size for size in others if size <= most)]
        # Estimates move a little all the time: what is in use is not left as soon as it takes a little longer.
        limits_s = {size: self._longest_s * (TOO_LONG if size <= self._choice.current else 1.0) for size in fitting}
        return [size for size in fitting if size == smallest or self._seconds(size) <= limits_s[size]]

    def _seconds(self, size: int) -> float:
        return size * math.exp(self._choice.costs.log_cost(size) + self._slowness)

    def _renew_plan(self) -> None:
        costs = {size: self._choice.costs.log_cost(size) for size in self._sizes if size <= self._choice.current}
        is_other = costs.keys() != self._planned.keys()
        if is_other or any(abs(cost - self._planned[size]) > PLAN_SHIFT for size, cost in costs.items()):
            self._planned = costs
            plan = next_batches({size: size * math.exp(cost) for size, cost in costs.items()})
            # The largest is chosen with more care than two estimates that lie close together.
            self._plan = (*plan[:-1], self._choice.current)


class _Memory:
    """Up to which size there was memory, and until when a larger one is not tried again."""

    def __init__(self) -> None:
        self._most = math.inf
        self._until_s = -math.inf
        self._for_s = MEMORY_S

    def most(self, now_s: float) -> float:
        """The largest size that may be run."""
        return self._most if now_s < self._until_s else math.inf

    def lower(self, most: int, now_s: float) -> None:
        """There was none for more than this."""
        if now_s >= self._until_s:
            self._most, self._until_s = most, now_s + self._for_s
            self._for_s = min(LONGEST_MEMORY_S, 2 * self._for_s)
        self._most = min(self._most, most)


def guess_costs(sizes: Sequence[int], measured: Mapping[int, float]) -> dict[int, float]:
    """The cost of an image in a batch of each size, from what some sizes' batches cost.

    Between and beyond those that were measured a batch is taken to cost so much by itself and so much for each image.
    """
    smallest, largest = min(measured), max(measured)
    if smallest == largest:
        fixed = FIXED_PART * measured[smallest]
        by_image = (measured[smallest] - fixed) / smallest
    else:
        by_image = (measured[largest] - measured[smallest]) / (largest - smallest)
        # What was disturbed must not make images cost nothing, or less.
        by_image = min(max(by_image, measured[largest] / largest / 2), measured[largest] / largest)
        fixed = measured[largest] - largest * by_image
    return {size: measured[size] / size if size in measured else fixed / size + by_image for size in sizes}


def first_choice(per_image: Mapping[int, float]) -> int:
    """The smallest size at which an image costs about as little as at any."""
    least = min(per_image.values())
    return min(size for size, cost in per_image.items() if cost <= ABOUT * least)
