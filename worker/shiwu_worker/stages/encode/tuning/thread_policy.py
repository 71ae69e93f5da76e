"""Chooses how a model uses the cores of a CPU: how many threads, and whether each works on a part of a batch.

The choice follows from the cores that the process may use, counted again every few seconds, and from the core-seconds
of an image, which other programs do not change. How many threads work together on an unsplit batch is learned from the
time of such batches. When other programs use the cores, all threads wait at each step for the slowest, and one thread
alone can be faster.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from shiwu_worker.stages.encode.tuning.adaptive_choice import AdaptiveChoice

LOADING_CORE_S: Final = 0.004
"""Loading an image takes about so many core-seconds: those of 512 x 512 pixels from HTTP 0.0036, larger ones more."""
MAX_FAST_CORE_S: Final = 0.04
"""A model that takes more core-seconds for an image is not fast, however many cores there are."""
FAST_MODEL_HYSTERESIS: Final = 1.25
"""A fast model counts as fast until an image takes this many times as long, and the other way round."""
MAX_SPLIT_THREADS: Final = 8
"""Each part of a batch holds Python's lock for about 5 ms of a pass, so more threads would wait for each other."""
POLL_INTERVAL_S: Final = 5.0
COST_GAIN: Final = 0.1
"""Weight of one batch in the estimate of the core-seconds of an image."""
SERIAL_SHARE: Final = 0.2
"""First estimate of the share of a batch that threads cannot do in parallel."""
GUESSED_SD: Final = 1.0
"""Standard deviation of the logarithm of that estimate."""
PACE_GAIN: Final = 0.3
USUAL_PACE_GAIN: Final = 0.02
PACE_JUMP: Final = math.log(2)
"""Log change of the time of a batch after which all is learned again, because the cores are shared differently."""
MIN_RELEARN_INTERVAL_S: Final = 30.0
"""Least time between two such restarts."""
TRY_TIMEOUT_S: Final = 10.0
"""A tried batch that is not recorded by then has failed, or was not a batch of jobs."""

Reason = Literal["cores", "cost_of_an_image", "faster"]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The threads of a model."""

    threads: int
    splits_batches: bool
    """Whether each thread works on a part of a batch, if its size allows it."""


@dataclass(frozen=True, slots=True)
class ThreadChange:
    """The threads of the model have changed."""

    before: Arrangement
    now: Arrangement
    together_before: int
    together: int
    """Threads that work together on an unsplit batch."""
    reason: Reason


def fast_below_s(cores: int) -> float:
    """A model that takes fewer core-seconds for an image is fast on so many cores.

    The loaders then take a core or more of them. With a core of its own for them, a model that takes m seconds makes
    (cores - 1) / m vectors a second; if it shares all cores with them, cores / (m + LOADING_CORE_S), which is more for
    m > (cores - 1) * LOADING_CORE_S.
    """
    return min(MAX_FAST_CORE_S, (cores - 1) * LOADING_CORE_S)


class ThreadPolicy:
    """Chooses threads from the usable cores and from the batches that were run. Thread-safe; no method waits.

    Args:
        core_s: core-seconds of one image in the smallest batch, as measured at the start.
        cores: returns how many cores this process may use now.
        fixed: threads that the operator asked for; None lets the cores decide.
        max_threads: most threads, however many cores there are; None for no limit.
        is_compiled: the model is compiled: it runs unsplit, with the number of threads it was compiled for.
        on_change: called when the threads have changed; must not block.
    """

    def __init__(
        self,
        *,
        core_s: float,
        cores: Callable[[], int],
        fixed: int | None = None,
        max_threads: int | None = None,
        is_compiled: bool = False,
        on_change: Callable[[ThreadChange], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core_s = core_s
        self._count_cores = cores
        self._fixed = fixed
        self._max_threads = max_threads
        self._is_compiled = is_compiled
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._cores = cores()
        self._is_fast = core_s < fast_below_s(self._cores)
        self._updated_s = clock()
        self.arrangement = self._arrange()
        self._restart_learning(self.arrangement.threads)

    def _arrange(self) -> Arrangement:
        threads = self._fixed or min(self._cores, self._max_threads or self._cores)
        if self._is_fast and not self._fixed:
            # The loaders of a fast model use about one core, so they get one.
            threads -= 1
        threads = max(1, threads)
        may_split = 1 < threads <= MAX_SPLIT_THREADS and not self._is_compiled
        return Arrangement(threads, splits_batches=may_split and not self._is_fast)

    def _restart_learning(self, first: int) -> None:
        """Forget what was learned and begin with `first` threads that work together."""
        threads = self.arrangement.threads
        self._together: AdaptiveChoice | None = None
        self._trying: int | None = None
        self._tried_s = -math.inf
        self._restarted_s = self._clock()
        self._pace = self._usual_pace = math.nan
        """Logarithm of the seconds that a unit of work took recently, and over a longer time."""
        if threads > 1 and not self._fixed and not self._is_compiled:
            counts = {1 << power for power in range(threads.bit_length()) if 1 << power < threads} | {threads}
            guesses = {count: (SERIAL_SHARE + (1 - SERIAL_SHARE) / count, GUESSED_SD) for count in counts}
            self._together = AdaptiveChoice(guesses, first=first)

    @property
    def together(self) -> int:
        """How many threads work together on an unsplit batch, apart from tries of other numbers."""
        return self.arrangement.threads if self._together is None else self._together.current

    def update(self) -> Arrangement:
        """The current arrangement; recomputed every few seconds."""
        change = None
        with self._lock:
            now_s = self._clock()
            if now_s - self._updated_s >= POLL_INTERVAL_S and not self._is_compiled:
                self._updated_s = now_s
                change = self._rearrange()
        if change is not None:
            self._on_change(change)
        return self.arrangement

    def _rearrange(self) -> ThreadChange | None:
        before, together, was_fast, had_cores = self.arrangement, self.together, self._is_fast, self._cores
        self._cores = self._count_cores()
        hysteresis = FAST_MODEL_HYSTERESIS if was_fast else 1 / FAST_MODEL_HYSTERESIS
        self._is_fast = self._core_s < fast_below_s(self._cores) * hysteresis
        self.arrangement = self._arrange()
        if self.arrangement == before:
            return None
        self._restart_learning(self.arrangement.threads)
        reason: Reason = "cores" if self._cores != had_cores else "cost_of_an_image"
        return ThreadChange(before, self.arrangement, together, self.together, reason)

    def next_together(self, work: float) -> int:
        """How many threads work on the next batch, which is not split.

        Args:
            work: the amount of work in the batch, in a unit that is the same for all batches.
        """
        with self._lock:
            if self._together is None:
                return self.arrangement.threads
            now_s = self._clock()
            if now_s - self._tried_s <= TRY_TIMEOUT_S or math.isnan(self._pace):
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
            core_s: core-seconds of an image, as in the smallest batch; None if not known.
            together: threads that worked on the batch as a whole; 0 if it was split.
            seconds: how long the batch took.
        """
        change = None
        with self._lock:
            if core_s is not None:
                self._core_s += COST_GAIN * (core_s - self._core_s)
            if self._together is not None and together in self._together.allowed:
                change = self._record_together(self._together, together, work=work, seconds=seconds)
        if change is not None:
            self._on_change(change)

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
            if abs(self._pace - self._usual_pace) > PACE_JUMP and now_s - self._restarted_s > MIN_RELEARN_INTERVAL_S:
                self._restart_learning(choice.current)
                return None
        change = choice.record(count, seconds / work, seconds=seconds, now_s=now_s, wasted_s=wasted_s)
        if change is None:
            return None
        self._pace = self._usual_pace = math.nan
        return ThreadChange(self.arrangement, self.arrangement, change.before, change.now, "faster")
