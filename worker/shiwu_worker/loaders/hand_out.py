"""Decides which waiting image gets the next free loader thread. Starts nothing and waits for nothing.

Interactive comes first, and bulk leaves part of the threads free for it. One source gets part of the threads until it
has proved quick, so a host that sends slowly cannot take all of them. A source that was slow lately comes last.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from shiwu.contract import Lane
from shiwu_worker.loaders.protocol import LoadTask
from shiwu_worker.policy.limits import LoadShares

INTERACTIVE: Final = 0
BULK: Final = 1
"""Positions in lists with one item for each lane: the hash of an enum's member costs more than all of the rest here."""
MAX_SOURCES: Final = 1024
"""Sources that are remembered without tasks, because producers name them; the oldest is forgotten first."""
SLOW_WEIGHT: Final = 0.2
"""How much one load changes the slowness of its source, which is between 0 and 1."""
SLOW_FROM: Final = 0.3
"""Slowness from which a source counts as slow: two slow loads of a source that was unknown."""
SLOWNESS_HALF_LIFE_S: Final = 30.0
SLOW_DELAY_S: Final = 10.0
"""How much later a task of a completely slow source counts as submitted, and the mean pause of a refused one."""
FORGIVEN: Final = 0.01
"""Slowness that counts as none."""
QUICK_LOADS: Final = 8
QUICK_S: Final = 2.0
"""A source is quick after so many good loads that took less than this on average."""


class _Source:
    """What is known of one host, bucket or folder tree, and its tasks. Lists have one item for each lane."""

    __slots__ = ("good_loads", "held", "listed", "mean_s", "name", "slowness", "slowness_at_s", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = [0, 0]
        self.waiting: tuple[deque[tuple[float, int, LoadTask]], ...] = (deque(), deque())
        """Tasks with the time and the number of their submission."""
        self.listed = [False, False]
        """Whether the source is in the heap of the lane."""
        self.slowness = self.slowness_at_s = 0.0
        self.good_loads = 0
        self.mean_s = 0.0

    @property
    def is_idle(self) -> bool:
        return not any(self.held) and not any(self.waiting)

    def slowness_now(self, now_s: float) -> float:
        if not self.slowness:
            return 0.0
        return self.slowness * math.exp2((self.slowness_at_s - now_s) / SLOWNESS_HALF_LIFE_S)

    def is_slow(self, now_s: float) -> bool:
        return self.slowness >= SLOW_FROM and self.slowness_now(now_s) >= SLOW_FROM

    @property
    def is_quick(self) -> bool:
        return self.good_loads >= QUICK_LOADS and self.mean_s < QUICK_S

    def note(self, seconds: float, *, is_good: bool, is_slow: bool, now_s: float) -> None:
        if is_slow or self.slowness:
            slowness = (1 - SLOW_WEIGHT) * self.slowness_now(now_s) + SLOW_WEIGHT * is_slow
            self.slowness, self.slowness_at_s = slowness if slowness > FORGIVEN else 0.0, now_s
        if is_slow:
            self.good_loads = 0
        elif is_good:
            self.good_loads += 1
            weight = SLOW_WEIGHT if self.good_loads * SLOW_WEIGHT >= 1 else 1 / self.good_loads
            self.mean_s += weight * (seconds - self.mean_s)


@dataclass(frozen=True, slots=True)
class Refused:
    """A task that gives its slot back, because its source is slow and has enough tasks here."""

    task: LoadTask
    pause_s: float


class HandOut:
    """The waiting tasks, and how many threads each source and lane holds. Not thread-safe.

    Args:
        threads: loader threads of the worker while all its loaders run.
        clock: gives monotonic seconds.
    """

    def __init__(self, shares: LoadShares, *, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares = shares
        self._threads = threads
        self._clock = clock
        if fixed := shares.source_threads:
            quick = usual = slow = fixed, max(1, fixed - shares.reserve_of(fixed))
        else:
            reserve, most_bulk = shares.reserve_of(threads), max(1, threads // 2)
            most_bulk_slow = max(1, most_bulk // 4)
            quick, usual = (threads, threads), (most_bulk + reserve, most_bulk)
            slow = most_bulk_slow + reserve, most_bulk_slow
        self._quick_limits, self._usual_limits, self._slow_limits = quick, usual, slow
        """Most threads of one source in all, and most for bulk, which leaves some to interactive jobs of the source."""
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._heaps: tuple[list[tuple[float, int, _Source]], ...] = ([], [])
        self._at_slow_limit: dict[str, _Source] = {}
        """Sources whose tasks may start without another event, when they count as slow no more."""
        self._held = [0, 0]
        self._waiting = [0, 0]
        self._bulk_owed = 0.0
        self._submitted = 0
        self._refused: list[Refused] = []

    def __len__(self) -> int:
        return sum(self._waiting)

    def add(self, tasks: Sequence[LoadTask]) -> None:
        """Let these tasks wait for a thread."""
        now_s = self._clock()
        for task in tasks:
            source, lane = self._source(task.source), _lane(task)
            queue = source.waiting[lane]
            if source.is_slow(now_s) and len(queue) >= self._most_waiting(source, lane, now_s):
                self._refuse(task)
                continue
            self._submitted += 1
            queue.append((now_s, self._submitted, task))
            self._waiting[lane] += 1
            self._list(source, lane, now_s)

    def take(self, threads: int) -> LoadTask | None:
        """The task for a thread that is free now, or None where none may have it.

        Args:
            threads: loader threads of the loaders that run now, free and busy ones.
        """
        if self._at_slow_limit:
            self._forgive(self._clock())
        if not (self._heaps[INTERACTIVE] or self._heaps[BULK]):
            return None
        for lane in (BULK, INTERACTIVE) if self._bulk_owed >= 1 else (INTERACTIVE, BULK):
            if not self._heaps[lane]:
                continue
            if lane == BULK and self._held[BULK] >= threads - self._shares.reserve_of(threads):
                continue
            if (task := self._pop(lane)) is not None:
                self._note_turn(lane)
                return task
        return None

    def take_several(self, count: int, *, threads: int) -> list[LoadTask]:
        """The tasks for so many threads that are free now, fewer where no more may start; see `take`."""
        tasks: list[LoadTask] = []
        while len(tasks) < count and (task := self.take(threads)) is not None:
            tasks.append(task)
        return tasks

    def done(self, task: LoadTask, *, seconds: float = 0.0, has_failed: bool | None = None) -> None:
        """The thread of a task that `take` returned is free again.

        Args:
            seconds: how long the fetch took.
            has_failed: whether the fetch failed; None where this tells nothing about the source.
        """
        now_s = self._clock()
        source, lane = self._source(task.source), _lane(task)
        source.held[lane] -= 1
        self._held[lane] -= 1
        if has_failed is not None:
            is_slow = has_failed and seconds >= self._shares.slow_s
            source.note(seconds, is_good=not has_failed, is_slow=is_slow, now_s=now_s)
        is_slow = source.is_slow(now_s)
        for lane in (INTERACTIVE, BULK):
            if is_slow:
                self._refuse_surplus(source, lane, now_s)
            if source.waiting[lane] and not source.listed[lane]:
                self._list(source, lane, now_s)

    def take_refused(self) -> list[Refused]:
        """The tasks that were refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def limit(self, name: str, lane: Lane) -> int:
        """How many threads this source may hold now, at least one: for bulk, or for both lanes together."""
        most, most_bulk = self._limits(self._source(name), self._clock())
        return most_bulk if lane is Lane.BULK else most

    # -------------------------------------------------------------------------------- one source
    def _limits(self, source: _Source, now_s: float) -> tuple[int, int]:
        if source.is_slow(now_s):
            return self._slow_limits
        return self._quick_limits if source.is_quick else self._usual_limits

    def _may_start(self, source: _Source, lane: int, now_s: float) -> bool:
        most, most_bulk = self._limits(source, now_s)
        held = source.held
        return held[INTERACTIVE] + held[BULK] < most and (lane == INTERACTIVE or held[BULK] < most_bulk)

    def _most_waiting(self, source: _Source, lane: int, now_s: float) -> int:
        return 2 * self._limits(source, now_s)[lane]

    def _refuse_surplus(self, source: _Source, lane: int, now_s: float) -> None:
        queue = source.waiting[lane]
        while len(queue) > self._most_waiting(source, lane, now_s):
            self._refuse(queue.pop()[2])
            self._waiting[lane] -= 1

    def _refuse(self, task: LoadTask) -> None:
        pause_s = SLOW_DELAY_S * random.uniform(0.5, 1.5)  # noqa: S311 jitter, no secret
        self._refused.append(Refused(task, pause_s))

    # -------------------------------------------------------------------------------- all sources
    def _list(self, source: _Source, lane: int, now_s: float) -> None:
        """Put the source into the heap of the lane if its oldest task may start.

        A source at its limit is listed again when one of its loads ends, or when it is forgiven.
        """
        queue = source.waiting[lane]
        if not queue or source.listed[lane]:
            return
        if self._may_start(source, lane, now_s):
            submitted_s, number, _ = queue[0]
            delay_s = SLOW_DELAY_S * source.slowness_now(now_s) if source.is_slow(now_s) else 0.0
            # The numbers differ, so sources are never compared.
            heappush(self._heaps[lane], (submitted_s + delay_s, number, source))
            source.listed[lane] = True
        elif source.is_slow(now_s):
            self._at_slow_limit[source.name] = source

    def _forgive(self, now_s: float) -> None:
        for source in [source for source in self._at_slow_limit.values() if not source.is_slow(now_s)]:
            del self._at_slow_limit[source.name]
            for lane in (INTERACTIVE, BULK):
                self._list(source, lane, now_s)

    def _pop(self, lane: int) -> LoadTask | None:
        now_s = self._clock()
        heap = self._heaps[lane]
        while heap:
            source = heappop(heap)[2]
            source.listed[lane] = False
            queue = source.waiting[lane]
            if not queue or not self._may_start(source, lane, now_s):
                self._list(source, lane, now_s)
                continue
            task = queue.popleft()[2]
            self._waiting[lane] -= 1
            self._held[lane] += 1
            source.held[lane] += 1
            self._list(source, lane, now_s)
            return task
        return None

    def _note_turn(self, lane: int) -> None:
        """The bulk share adds up while bulk tasks wait."""
        if lane == BULK:
            self._bulk_owed = self._bulk_owed - 1 if self._bulk_owed > 1 else 0.0
        elif self._waiting[BULK]:
            self._bulk_owed = min(2.0, self._bulk_owed + self._shares.bulk_share)

    def _source(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source(name)
            if len(self._sources) > MAX_SOURCES:
                self._forget_one(source)
        self._sources.move_to_end(name)
        return source

    def _forget_one(self, but: _Source) -> None:
        old = next((source for source in self._sources.values() if source is not but and source.is_idle), None)
        if old is not None:
            del self._sources[old.name]


def _lane(task: LoadTask) -> int:
    return BULK if task.lane is Lane.BULK else INTERACTIVE
