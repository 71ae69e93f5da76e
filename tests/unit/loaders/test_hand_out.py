"""Which waiting image gets the next loader thread: interactive first, no source takes all, each has its turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shiwu.contract import Lane
from shiwu_worker.loaders.hand_out import MAX_SOURCES, QUICK_LOADS, HandOut
from shiwu_worker.loaders.protocol import LoadTask
from shiwu_worker.policy.limits import LoadShares

SLOW: Final = 6.0


@dataclass
class World:
    """A hand-out with a clock that tests move, and the tasks that hold a thread."""

    threads: int = 8
    shares: LoadShares = field(default_factory=LoadShares)
    now_s: float = 100.0
    held: list[LoadTask] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.waiting = HandOut(self.shares, threads=self.threads, clock=lambda: self.now_s)

    def add(self, count: int, source: str, lane: Lane = Lane.BULK) -> list[LoadTask]:
        """Let new tasks wait."""
        tasks = [LoadTask(self.number + n, 0, "", lane, source) for n in range(count)]
        self.number += count
        self.waiting.add(tasks)
        return tasks

    def fill(self) -> list[LoadTask]:
        """Hand out until no thread is free or no task may start."""
        taken = []
        while len(self.held) < self.threads and (task := self.waiting.take(self.threads)) is not None:
            self.held.append(task)
            taken.append(task)
        return taken

    def end(self, task: LoadTask, *, seconds: float = 0.1, has_failed: bool = False) -> None:
        """The load of this task ends."""
        self.held.remove(task)
        self.waiting.done(task, seconds=seconds, has_failed=has_failed)

    def prove_quick(self, source: str) -> None:
        """Load enough images of this source without delay."""
        for _ in range(QUICK_LOADS):
            self.add(1, source)
            [task] = self.fill()
            self.end(task)


def sources(tasks: list[LoadTask]) -> Counter[str]:
    """How many tasks of each source."""
    return Counter(task.source for task in tasks)


def test_slow_bulk_source_leaves_threads_to_all_others() -> None:
    """200 images of one host: interactive starts immediately, and so does another host in bulk."""
    world = World()
    world.add(200, "drip")
    assert len(world.fill()) == 4
    world.add(3, "other")
    assert sources(world.fill()) == {"other": 2}
    world.add(1, "shop", Lane.INTERACTIVE)
    assert sources(world.fill()) == {"shop": 1}
    world.add(1, "drip", Lane.INTERACTIVE)
    assert sources(world.fill()) == {"drip": 1}


def test_single_thread_serves_interactive_first_and_bulk_too() -> None:
    """Nothing can be reserved of one thread, so interactive waits for at most one load."""
    world = World(threads=1)
    world.add(2, "a")
    [bulk] = world.fill()
    world.add(2, "a", Lane.INTERACTIVE)
    assert world.fill() == []
    world.end(bulk)
    assert [task.lane for task in world.fill()] == [Lane.INTERACTIVE]


def test_quick_source_gets_all_threads_of_its_lane() -> None:
    """One bucket is the usual case, and must not be slower than before."""
    world = World()
    world.prove_quick("bucket")
    world.add(20, "bucket")
    assert len(world.fill()) == 6
    world.add(20, "bucket", Lane.INTERACTIVE)
    assert len(world.fill()) == 2


def test_fixed_limit_of_a_source_holds_for_quick_ones_too() -> None:
    """An operator sets it where a source must not be asked more."""
    world = World(shares=LoadShares(source_threads=4))
    world.prove_quick("shop")
    world.add(20, "shop")
    assert len(world.fill()) == 3
    world.add(20, "shop", Lane.INTERACTIVE)
    assert len(world.fill()) == 1
    for task in list(world.held):
        world.end(task)
    assert len(world.fill()) == 4


def test_bulk_share_is_kept_while_interactive_waits() -> None:
    """One of ten, as for claims and batches."""
    world = World(shares=LoadShares(bulk_share=0.1, source_threads=8))
    world.add(100, "a")
    world.add(300, "b", Lane.INTERACTIVE)
    lanes: Counter[Lane] = Counter()
    for _ in range(220):
        lanes.update(task.lane for task in world.fill())
        world.end(world.held[0])
    assert lanes[Lane.BULK] == pytest.approx(0.09 * lanes.total(), abs=3)


def test_slow_source_comes_last_until_it_is_forgiven() -> None:
    """Its images count as submitted later, so others pass by; the delay ends by itself."""
    world = World()
    for _ in range(5):
        world.add(1, "drip")
        [task] = world.fill()
        world.end(task, seconds=SLOW, has_failed=True)
    assert world.waiting.limit("drip", Lane.BULK) == 1
    world.add(1, "drip")
    world.now_s += 1.0
    world.add(2, "other")
    assert [task.source for task in world.fill()] == ["other", "other", "drip"]
    world.now_s += 120.0
    assert world.waiting.limit("drip", Lane.BULK) == 4


def test_surplus_of_a_slow_source_gives_its_slots_back() -> None:
    """Otherwise its images would hold the slots of all bulk for minutes."""
    world = World()
    tasks = world.add(50, "drip")
    ended = []
    while world.waiting.limit("drip", Lane.BULK) > 1:
        world.fill()
        ended.append(world.held[0])
        world.end(world.held[0], seconds=SLOW, has_failed=True)
    refused = world.waiting.take_refused()
    assert len(world.waiting) == 2
    assert {each.task.ticket for each in refused} == {task.ticket for task in tasks[-len(refused) :]}
    assert all(5.0 <= each.pause_s <= 15.0 for each in refused)
    assert len(refused) + len(world.held) + len(ended) + 2 == 50
    world.add(3, "drip")
    assert len(world.waiting.take_refused()) == 3


def test_other_failures_are_not_slowness() -> None:
    """Missing images and refused connections keep no thread; an image in quarantine tells nothing of its source."""
    world = World()
    for _ in range(10):
        world.add(1, "a")
        [task] = world.fill()
        world.end(task, seconds=0.2, has_failed=True)
        world.add(1, "a")
        [task] = world.fill()
        world.held.remove(task)
        world.waiting.done(task)
    assert world.waiting.limit("a", Lane.BULK) == 4


def test_number_of_remembered_sources_is_bounded() -> None:
    """Producers name them."""
    world = World()
    for n in range(MAX_SOURCES + 50):
        world.add(1, f"{n}")
        [task] = world.fill()
        world.end(task)
    assert len(world.waiting._sources) <= MAX_SOURCES


class HandOutRules(RuleBasedStateMachine):
    """Any order of submissions, hand-outs and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(threads=5)
        self.waiting: dict[int, LoadTask] = {}
        self.limits: dict[tuple[str, Lane], int] = {}

    @rule(
        count=st.integers(1, 6), source=st.sampled_from("abc"), lane=st.sampled_from(list(Lane)), s=st.floats(0.0, 20.0)
    )
    def submit(self, count: int, source: str, lane: Lane, s: float) -> None:
        """New tasks after a pause."""
        self.world.now_s += s
        self.waiting |= {task.ticket: task for task in self.world.add(count, source, lane)}
        self.drop_refused()

    @rule()
    def hand_out(self) -> None:
        """Every hand-out keeps to the limits at that moment."""
        world = self.world
        while len(world.held) < world.threads and (task := world.waiting.take(world.threads)) is not None:
            del self.waiting[task.ticket]
            world.held.append(task)
            bulk = [each for each in world.held if each.lane is Lane.BULK]
            assert task.lane is Lane.INTERACTIVE or len(bulk) <= world.threads - 1
            if task.lane is Lane.BULK:
                assert sources(bulk)[task.source] <= world.waiting.limit(task.source, Lane.BULK)
            assert sources(world.held)[task.source] <= world.waiting.limit(task.source, Lane.INTERACTIVE)
        if len(world.held) < world.threads:
            self.check_that_all_waiting_are_at_a_limit()

    def check_that_all_waiting_are_at_a_limit(self) -> None:
        """With a free thread interactive waits for its own source only, and bulk for that or for its share."""
        world = self.world
        bulk = [each for each in world.held if each.lane is Lane.BULK]
        for task in self.waiting.values():
            limit = world.waiting.limit
            is_source_full = sources(world.held)[task.source] >= limit(task.source, Lane.INTERACTIVE)
            if task.lane is Lane.BULK:
                is_source_full |= sources(bulk)[task.source] >= limit(task.source, Lane.BULK)
                is_source_full |= len(bulk) >= world.threads - 1
            assert is_source_full, f"{task} waits beside a free thread"

    @precondition(lambda self: self.world.held)
    @rule(data=st.data(), seconds=st.floats(0.0, 20.0), has_failed=st.booleans())
    def end(self, data: st.DataObject, seconds: float, has_failed: bool) -> None:
        """One load ends."""
        task = data.draw(st.sampled_from(self.world.held))
        self.world.now_s += seconds
        self.world.end(task, seconds=seconds, has_failed=has_failed)
        self.drop_refused()

    def drop_refused(self) -> None:
        """Refused tasks wait no more."""
        for refused in self.world.waiting.take_refused():
            del self.waiting[refused.task.ticket]

    @invariant()
    def no_task_is_lost(self) -> None:
        """Each one waits, holds a thread, or was refused or done."""
        assert len(self.world.waiting) == len(self.waiting)

    def teardown(self) -> None:
        """Every waiting task has its turn once loads end."""
        for _ in range(len(self.waiting) + len(self.world.held) + 1):
            self.hand_out()
            if self.world.held:
                self.world.end(self.world.held[0])
        assert not self.waiting


HandOutRules.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_hand_out_keeps_its_promises_in_any_order = HandOutRules.TestCase


def test_several_tasks_are_no_more_than_were_asked_for() -> None:
    """Also interactive ones of different sources, for which no other limit holds."""
    world = World()
    for source in "abcde":
        world.add(1, source, Lane.INTERACTIVE)
    assert [task.ticket for task in world.waiting.take_several(2, threads=8)] == [0, 1]
    assert [task.ticket for task in world.waiting.take_several(9, threads=8)] == [2, 3, 4]
    assert world.waiting.take_several(1, threads=8) == []
