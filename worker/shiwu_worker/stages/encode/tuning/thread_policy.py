"""How a model uses the cores of a CPU: how many threads, and whether each works on a part of a batch.

It follows from the cores that the process may use, which are counted again every few seconds, and from the core-seconds
that an image takes, which other programs do not change. How many threads work together on a batch that is not divided
is learned from the time that such batches take: where other programs use the cores, all threads wait at each step for
the one that is held up, and one thread alone is quicker.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.tuning.adaptive_choice import AdaptiveChoice

QUICK_CORE_S: Final = 0.04
"""Core-seconds of an image in the model; loading one takes 0.002."""
BORDER: Final = 1.25
"""A model that is quick is so until an image takes so many times as long, and the other way round."""
MAX_DIVIDED: Final = 8
"""Each part of a batch takes Python's lock for some 5 ms of a pass: more threads than that wait for each other."""
POLL_INTERVAL_S: Final = 5.0
COST_GAIN: Final = 0.1
"""What one batch counts for the core-seconds of an image."""
SERIAL: Final = 0.2
"""Share of a batch that threads can't do together, as a first guess."""
GUESSED_SD: Final = 1.0
"""Standard deviation of the logarithm of that guess."""
PACE_GAIN: Final = 0.3
USUAL_PACE_GAIN: Final = 0.02
OTHER_PACE: Final = math.log(2)
"""Where batches take twice or half as long as before, the cores are shared in another way: all is learned anew."""
ANEW_S: Final = 30.0
"""That happens no more often."""

TRY_ENDS_S: Final = 10.0
"""A batch that was to be tried and is not recorded by then has failed, or was none of the jobs'."""

Reason = Literal["cores", "cost_of_an_image", "faster"]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Threads of a model."""

    threads: int
    is_divided: bool
    """Whether each of them works on a part of a batch, where the batch can be divided."""


@dataclass(frozen=True, slots=True)
class ThreadChange:
    """The model's threads are others now."""

    before: Arrangement
    now: Arrangement
    together_before: int
    together: int
    """Threads that work together on a batch that is not divided."""
    reason: Reason


class ThreadPolicy:
    """Thread-safe; nothing in it waits.

    Args:
        core_s: of one image in the smallest batch, as measured before the first one.
        cores: how many this process may use now.
        fixed: threads that the operator asked for; None: as many as follow from the cores.
        most: threads at most, whatever the cores.
        is_compiled: such a model can't be divided, and its number of threads is built in.
        on_change: told that threads have changed; must not block.
    """

    def __init__(
        self,
        *,
        core_s: float,
        cores: Callable[[], int],
        fixed: int | None = None,
        most: int | None = None,
        is_compiled: bool = False,
        on_change: Callable[[ThreadChange], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core_s = core_s
        self._count_cores = cores
        self._fixed = fixed
        self._most = most
        self._is_compiled = is_compiled
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._is_quick = core_s < QUICK_CORE_S
        self._cores = cores()
        self._looked_s = clock()
        self.arrangement = self._arrange()
        self._learn_anew(self.arrangement.threads)

    def _arrange(self) -> Arrangement:
        threads = self._fixed or min(self._cores, self._most or self._cores)
        if self._is_quick and not self._fixed:
            # The loaders take nearly as much as the model: they get a core.
            threads -= 1
        threads = max(1, threads)
        may_divide = 1 < threads <= MAX_DIVIDED and not self._is_compiled
        return Arrangement(threads, is_divided=may_divide and not self._is_quick)

    def _learn_anew(self, first: int) -> None:
        """Begin with so many threads together, and know nothing of other numbers."""
        threads = self.arrangement.threads
        self._together: AdaptiveChoice | None = None
        self._trying: int | None = None
        self._tried_s = -math.inf
        self._anew_s = self._clock()
        self._pace = self._usual_pace = math.nan
        """Logarithm of the seconds that a unit of work took lately, and over a longer time."""
        if threads > 1 and not self._fixed and not self._is_compiled:
            counts = {1 << power for power in range(threads.bit_length()) if 1 << power < threads} | {threads}
            guesses = {count: (SERIAL + (1 - SERIAL) / count, GUESSED_SD) for count in counts}
            self._together = AdaptiveChoice(guesses, first=first)

    @property
    def together(self) -> int:
        """How many threads work together on a batch that is not divided, but for tries of other numbers."""
        return self.arrangement.threads if self._together is None else self._together.current

    def look(self) -> Arrangement:
        """The arrangement for now; every few seconds it is thought over."""
        told = None
        with self._lock:
            now_s = self._clock()
            if now_s - self._looked_s >= POLL_INTERVAL_S and not self._is_compiled:
                self._looked_s = now_s
                told = self._think()
        if told is not None:
            self._on_change(told)
        return self.arrangement

    def _think(self) -> ThreadChange | None:
        before, together, was_quick = self.arrangement, self.together, self._is_quick
        self._cores = self._count_cores()
        self._is_quick = self._core_s < QUICK_CORE_S * (BORDER if was_quick else 1 / BORDER)
        self.arrangement = self._arrange()
        if self.arrangement == before:
            return None
        self._learn_anew(self.arrangement.threads)
        reason: Reason = "cores" if self._is_quick == was_quick else "cost_of_an_image"
        return ThreadChange(before, self.arrangement, together, self.together, reason)

    def next_together(self, work: float) -> int:
        """How many threads are to work on the next batch, which is not divided.

        Args:
            work: how much there is in it, in a unit that is the same for all batches.
        """
        with self._lock:
            if self._together is None:
                return self.arrangement.threads
            now_s = self._clock()
            if now_s - self._tried_s <= TRY_ENDS_S or math.isnan(self._pace):
                return self._together.current
            units = dict.fromkeys(self._together.allowed, work)
            self._trying = self._together.next_try(now_s, unit_s=math.exp(self._pace), units=units)
            if self._trying is None:
                return self._together.current
            self._tried_s = now_s
            return self._trying

    def record(
        self, *, core_s: float | None = None, together: int = 0, work: float = 1.0, seconds: float = 0.0
    ) -> None:
        """Learn from a batch.

        Args:
            core_s: of an image, as it would be in the smallest batch; None where it is not known.
            together: threads that worked on the batch as a whole; 0: it was divided.
            seconds: that it took.
        """
        told = None
        with self._lock:
            if core_s is not None:
                self._core_s += COST_GAIN * (core_s - self._core_s)
            if self._together is not None and together in self._together.allowed:
                told = self._record_together(self._together, together, work=work, seconds=seconds)
        if told is not None:
            self._on_change(told)

    def _record_together(
        self, choice: AdaptiveChoice, count: int, *, work: float, seconds: float
    ) -> ThreadChange | None:
        now_s, pace = self._clock(), math.log(seconds / work)
        wasted_s = 0.0
        if count == self._trying:
            self._trying, self._tried_s = None, -math.inf
            wasted_s = max(0.0, seconds - work * math.exp(self._pace))
        elif math.isnan(self._pace):
            self._pace = self._usual_pace = pace
        else:
            self._pace += PACE_GAIN * (pace - self._pace)
            self._usual_pace += USUAL_PACE_GAIN * (pace - self._usual_pace)
            if abs(self._pace - self._usual_pace) > OTHER_PACE and now_s - self._anew_s > ANEW_S:
                self._learn_anew(choice.current)
                return None
        change = choice.record(count, seconds / work, seconds=seconds, now_s=now_s, wasted_s=wasted_s)
        if change is None:
            return None
        self._pace = self._usual_pace = math.nan
        return ThreadChange(self.arrangement, self.arrangement, change.before, change.now, "faster")
