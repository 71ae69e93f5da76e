"""Decides which waiting image gets the next free loader thread. Starts nothing and waits for nothing.

Interactive comes first, and bulk leaves part of the threads free for it. One source gets part of the threads until it
has proved quick, so a host that sends slowly cannot take all of them. A source that was slow lately comes last.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from shiwu.contract import Lane
from shiwu_worker.loaders.protocol import LoadTask
from shiwu_worker.policy.limits import LoadShares

MAX_SOURCES: Final = 1024
"""Sources that are remembered without tasks, because producers name them; the oldest is forgotten first."""
SLOW_S: Final = 3.0
"""A fetch that fails after so long kept its thread from other images."""
SLOW_WEIGHT: Final = 0.2
"""How much one load changes the slowness of its source, which is between 0 and 1."""
SLOW_FROM: Final = 0.3
"""Slowness from which a source counts as slow: two slow loads of a source that was unknown."""
SLOWNESS_HALF_LIFE_S: Final = 30.0
SLOW_DELAY_S: Final = 10.0
"""How much later a task of a completely slow source counts as submitted, and the mean pause of a refused one."""
QUICK_LOADS: Final = 8
QUICK_S: Final = 2.0
"""A source is quick after so many good loads that took less than this on average."""


@dataclass(slots=True)
class _Source:
    """What is known of one host, bucket or folder tree, and its tasks."""

    held: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    waiting: dict[Lane, deque[tuple[float, int, LoadTask]]] = field(
        default_factory=lambda: {lane: deque() for lane in Lane}
    )
    """Tasks with the time and the number of their submission."""
    listed: dict[Lane, bool] = field(default_factory=lambda: dict.fromkeys(Lane, False))
    """Whether the source is in the heap of this lane."""
    slowness: float = 0.0
    slowness_at_s: float = 0.0
    good_loads: int = 0
    mean_s: float = 0.0

    @property
    def is_idle(self) -> bool:
        return not any(self.held.values()) and not any(self.waiting.values())

    def slowness_now(self, now_s: float) -> float:
        return self.slowness * math.exp2((self.slowness_at_s - now_s) / SLOWNESS_HALF_LIFE_S)

    def is_slow(self, now_s: float) -> bool:
        return self.slowness_now(now_s) >= SLOW_FROM

    @property
    def is_quick(self) -> bool:
        return self.good_loads >= QUICK_LOADS and self.mean_s < QUICK_S

    def note(self, seconds: float, *, has_failed: bool, now_s: float) -> None:
        is_slow = has_failed and seconds >= SLOW_S
        self.slowness = (1 - SLOW_WEIGHT) * self.slowness_now(now_s) + SLOW_WEIGHT * is_slow
        self.slowness_at_s = now_s
        if is_slow:
            self.good_loads = 0
        elif not has_failed:
            self.good_loads += 1
            weight = max(SLOW_WEIGHT, 1 / self.good_loads)
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
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._heaps: dict[Lane, list[tuple[float, int, str]]] = {lane: [] for lane in Lane}
        self._held = dict.fromkeys(Lane, 0)
        self._waiting = dict.fromkeys(Lane, 0)
        self._bulk_owed = 0.0
        self._submitted = 0
        self._refused: list[Refused] = []

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def add(self, tasks: Sequence[LoadTask]) -> None:
        """Let these tasks wait for a thread."""
        now_s = self._clock()
        for task in tasks:
            source = self._source(task.source)
            queue = source.waiting[task.lane]
            if source.is_slow(now_s) and len(queue) >= self._most_waiting(source, task.lane, now_s):
                self._refuse(task)
                continue
            self._submitted += 1
            queue.append((now_s, self._submitted, task))
            self._waiting[task.lane] += 1
            self._list(task.source, source, task.lane, now_s)

    def take(self, threads: int) -> LoadTask | None:
        """The task for a thread that is free now, or None where none may have it.

        Args:
            threads: loader threads of the loaders that run now, free and busy ones.
        """
        has_bulk_room = self._held[Lane.BULK] < threads - self._shares.reserve_of(threads)
        lanes = (Lane.BULK, Lane.INTERACTIVE) if self._bulk_owed >= 1 else (Lane.INTERACTIVE, Lane.BULK)
        for lane in lanes:
            if (lane is Lane.INTERACTIVE or has_bulk_room) and (task := self._pop(lane)) is not None:
                self._note_turn(lane)
                return task
        return None

    def done(self, task: LoadTask, *, seconds: float = 0.0, has_failed: bool | None = None) -> None:
        """The thread of a task that `take` returned is free again.

        Args:
            seconds: how long the fetch took.
            has_failed: whether the fetch failed; None where this tells nothing about the source.
        """
        now_s = self._clock()
        source = self._source(task.source)
        source.held[task.lane] -= 1
        self._held[task.lane] -= 1
        if has_failed is not None:
            source.note(seconds, has_failed=has_failed, now_s=now_s)
        for lane in Lane:
            if source.is_slow(now_s):
                self._refuse_surplus(source, lane, now_s)
            self._list(task.source, source, lane, now_s)

    def take_refused(self) -> list[Refused]:
        """The tasks that were refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def limit(self, name: str, lane: Lane) -> int:
        """How many threads this source may hold now, at least one: for bulk, or for both lanes together."""
        return self._limit(self._source(name), lane, self._clock())

    # -------------------------------------------------------------------------------- one source
    def _limit(self, source: _Source, lane: Lane, now_s: float) -> int:
        """Bulk leaves part of the threads of a source to interactive, whose jobs may have the same source."""
        fixed = self._shares.source_threads
        if fixed:
            return fixed if lane is Lane.INTERACTIVE else max(1, fixed - self._shares.reserve_of(fixed))
        if source.is_quick and not source.is_slow(now_s):
            return self._threads
        most = max(1, self._threads // 2)
        if source.is_slow(now_s):
            most = max(1, most // 4)
        return most if lane is Lane.BULK else most + self._shares.reserve_of(self._threads)

    def _may_start(self, source: _Source, lane: Lane, now_s: float) -> bool:
        if sum(source.held.values()) >= self._limit(source, Lane.INTERACTIVE, now_s):
            return False
        return lane is Lane.INTERACTIVE or source.held[Lane.BULK] < self._limit(source, Lane.BULK, now_s)

    def _most_waiting(self, source: _Source, lane: Lane, now_s: float) -> int:
        return 2 * self._limit(source, lane, now_s)

    def _refuse_surplus(self, source: _Source, lane: Lane, now_s: float) -> None:
        queue = source.waiting[lane]
        while len(queue) > self._most_waiting(source, lane, now_s):
            self._refuse(queue.pop()[2])
            self._waiting[lane] -= 1

    def _refuse(self, task: LoadTask) -> None:
        pause_s = SLOW_DELAY_S * random.uniform(0.5, 1.5)  # noqa: S311 jitter, no secret
        self._refused.append(Refused(task, pause_s))

    # -------------------------------------------------------------------------------- all sources
    def _list(self, name: str, source: _Source, lane: Lane, now_s: float) -> None:
        """Put the source into the heap of the lane if its oldest task may start.

        A source at its limit is listed again when one of its loads ends.
        """
        queue = source.waiting[lane]
        if queue and not source.listed[lane] and self._may_start(source, lane, now_s):
            submitted_s, number, _ = queue[0]
            delay_s = SLOW_DELAY_S * source.slowness_now(now_s) if source.is_slow(now_s) else 0.0
            heappush(self._heaps[lane], (submitted_s + delay_s, number, name))
            source.listed[lane] = True

    def _pop(self, lane: Lane) -> LoadTask | None:
        now_s = self._clock()
        heap = self._heaps[lane]
        while heap:
            _, _, name = heappop(heap)
            source = self._source(name)
            source.listed[lane] = False
            queue = source.waiting[lane]
            if not queue or not self._may_start(source, lane, now_s):
                continue
            _, _, task = queue.popleft()
            self._waiting[lane] -= 1
            self._held[lane] += 1
            source.held[lane] += 1
            self._list(name, source, lane, now_s)
            return task
        return None

    def _note_turn(self, lane: Lane) -> None:
        """The bulk share adds up while bulk tasks wait."""
        if lane is Lane.BULK:
            self._bulk_owed = max(0.0, self._bulk_owed - 1)
        elif self._waiting[Lane.BULK]:
            self._bulk_owed = min(2.0, self._bulk_owed + self._shares.bulk_share)

    def _source(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source()
            if len(self._sources) > MAX_SOURCES:
                self._forget_one(name)
        self._sources.move_to_end(name)
        return source

    def _forget_one(self, but: str) -> None:
        old = next((name for name, source in self._idle_sources() if name != but), None)
        if old is not None:
            del self._sources[old]

    def _idle_sources(self) -> Iterator[tuple[str, _Source]]:
        return ((name, source) for name, source in self._sources.items() if source.is_idle)
