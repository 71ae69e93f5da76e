"""Jobs in flight: how many are claimed follows the size of the current batches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.contract import Lane
from shiwu_worker.pipeline.in_flight import MAX_JOBS_PER_SLOT, NO_ROOM, InFlightJobs, Room
from shiwu_worker.policy.limits import LoadShares
from tests.support.waiting import wait_until


def jobs(count: int, *, first: int = 0, lane: Lane = Lane.INTERACTIVE) -> list[Any]:
    """Jobs without a slot."""
    return [SimpleNamespace(id=f"{lane}{n}", slot=-1, lane=lane, shard=0) for n in range(first, first + count)]


def rooms(in_flight: InFlightJobs, *, is_quarantine_owner: bool = False) -> Room:
    """How many jobs would be claimed, without waiting."""
    return in_flight.wait_for_room(is_quarantine_owner=is_quarantine_owner, is_closing=lambda: False, timeout_s=0.0)


def room(in_flight: InFlightJobs, *, is_quarantine_owner: bool = False) -> int:
    """How many jobs of both lanes together."""
    return rooms(in_flight, is_quarantine_owner=is_quarantine_owner).total


def test_room_follows_the_size_of_current_batches() -> None:
    """With small batches the backlog stays in Redis; with larger ones more slots are used, but no more than exist."""
    wanted = [10]
    in_flight = InFlightJobs(slots=100, wanted=lambda: wanted[0])
    assert room(in_flight) == 10
    held = jobs(8)
    in_flight.add(held, held)
    assert room(in_flight) == 2
    wanted[0] = 40
    assert room(in_flight) == 32
    wanted[0] = 4
    assert room(in_flight) == 0
    wanted[0] = 1000
    assert room(in_flight) == 92
    in_flight.free_slots(held)
    in_flight.remove(held)
    assert room(in_flight) == 100


def test_jobs_that_wait_for_their_commit_leave_no_room() -> None:
    """They hold no slot, and are in flight nevertheless."""
    in_flight = InFlightJobs(slots=100, wanted=lambda: 10)
    in_flight.add(jobs(MAX_JOBS_PER_SLOT * 10), [])
    assert room(in_flight) == 0


def test_owner_of_the_quarantine_has_room_only_without_jobs() -> None:
    """A quarantined job runs alone, so the jobs in flight are finished first."""
    in_flight = InFlightJobs(slots=100, wanted=lambda: 10)
    held = jobs(1)
    in_flight.add(held, held)
    assert room(in_flight) == 9
    assert room(in_flight, is_quarantine_owner=True) == 0
    in_flight.free_slots(held)
    in_flight.remove(held)
    assert room(in_flight, is_quarantine_owner=True) == 10


def test_bulk_leaves_slots_for_interactive() -> None:
    """However long its jobs take, and also while they wait for their commit without a slot."""
    in_flight = InFlightJobs(slots=100)
    assert rooms(in_flight) == Room(100, 75)
    bulk = jobs(75, lane=Lane.BULK)
    in_flight.add(bulk, bulk)
    assert rooms(in_flight) == Room(25, 0)
    interactive = jobs(25)
    in_flight.add(interactive, interactive)
    assert rooms(in_flight) == NO_ROOM
    in_flight.free_slots(interactive)
    assert rooms(in_flight) == Room(25, 0)
    in_flight.free_slots(bulk)
    assert rooms(in_flight) == Room(100, 75)
    in_flight.add(jobs(150, first=75, lane=Lane.BULK), [])
    assert rooms(in_flight).bulk == 0
    assert rooms(in_flight).total == 50


def test_bulk_of_larger_batches_leaves_slots_for_interactive() -> None:
    """When batches become smaller, bulk has more slots than it may have, for as long as its jobs take."""
    wanted = [100]
    in_flight = InFlightJobs(slots=100, wanted=lambda: wanted[0])
    bulk = jobs(75, lane=Lane.BULK)
    in_flight.add(bulk, bulk)
    wanted[0] = 20
    assert rooms(in_flight) == Room(5, 0)
    interactive = jobs(3)
    in_flight.add(interactive, interactive)
    assert rooms(in_flight) == Room(2, 0)
    wanted[0] = 4
    assert rooms(in_flight) == NO_ROOM
    in_flight.free_slots(interactive)
    assert rooms(in_flight) == NO_ROOM
    in_flight.remove(interactive[:1])
    assert rooms(in_flight) == Room(1, 0)


def test_reserve_is_no_more_than_the_slots_that_are_free() -> None:
    """Slots that bulk has filled while no share was kept cannot be given twice."""
    in_flight = InFlightJobs(slots=100)
    bulk = jobs(98, lane=Lane.BULK)
    in_flight.add(bulk, bulk)
    assert rooms(in_flight) == Room(2, 0)


def test_worker_of_one_lane_reserves_no_slots() -> None:
    """No other lane would use them."""
    in_flight = InFlightJobs(slots=100, shares=LoadShares(interactive_reserve=0.0))
    assert rooms(in_flight) == Room(100, 100)


def test_bulk_room_is_reported_once_there_is_enough_of_it() -> None:
    """A claim for each freed slot would be a round trip for each image."""
    in_flight = InFlightJobs(slots=100)
    bulk = jobs(75, lane=Lane.BULK)
    in_flight.add(bulk, bulk)
    calls: list[int] = []
    assert in_flight.call_on_bulk_room(lambda: calls.append(1))
    in_flight.free_slots(bulk[:17])
    assert calls == []
    in_flight.free_slots(bulk[17:30])
    in_flight.free_slots(bulk[30:60])
    assert calls == [1]
    assert not in_flight.call_on_bulk_room(lambda: calls.append(2))


def test_jobs_that_wait_for_labels_leave_room_for_others() -> None:
    """They have slots of their own, as many as there are; beyond these they use the slots of others."""
    waiting = {Lane.BULK: 0, Lane.INTERACTIVE: 0}
    in_flight = InFlightJobs(slots=16, label_slots=8, waiting=lambda: waiting)
    assert rooms(in_flight) == Room(8, 6)
    held = jobs(6, lane=Lane.BULK)
    in_flight.add(held, held)
    assert rooms(in_flight) == Room(2, 0)
    waiting[Lane.BULK] = 3
    assert rooms(in_flight) == Room(5, 3)
    waiting[Lane.BULK] = 6
    assert rooms(in_flight) == Room(6, 4)
    waiting[Lane.INTERACTIVE] = 2
    more = jobs(8, first=6)
    in_flight.add(more, more)
    assert rooms(in_flight) == NO_ROOM


def test_every_slot_is_used_once_at_a_time() -> None:
    """Slot 0 too; each is taken back from a job that has ended, and goes to a later one."""
    in_flight = InFlightJobs(slots=3)
    for first in (0, 10):
        held = jobs(3, first=first)
        tickets = in_flight.add(held, held)
        assert sorted(job.slot for job in held) == [0, 1, 2]
        assert len({ticket for ticket, _ in tickets}) == 3
        assert room(in_flight) == 0
        in_flight.free_slots(held)
        in_flight.free_slots(jobs(2))
        in_flight.remove(held)
        assert room(in_flight) == 3
    in_flight.add(held[:1], held[:1])
    in_flight.free_slots(held[:1])
    assert sorted(in_flight._free) == [0, 1, 2]


def test_ticket_gives_its_job_once() -> None:
    """A result that comes twice, or for no job, is ignored."""
    in_flight = InFlightJobs(slots=3)
    one, two = jobs(2)
    [(first, _), (second, _)] = in_flight.add([one, two], [one, two])
    assert in_flight.match([second, 99, first, second]) == [two, None, one, None]


def test_earlier_attempt_stays_when_another_is_removed() -> None:
    """Two jobs with one id: the one that is in flight is not replaced, marked with the other, or removed for it."""
    in_flight = InFlightJobs(slots=3)
    [one], [again] = jobs(1, lane=Lane.BULK), jobs(1, lane=Lane.BULK)
    in_flight.add([one], [one])
    in_flight.add([again], [])
    in_flight.remove([again])
    [held] = in_flight.jobs()
    assert held is one
    in_flight.mark_answered_elsewhere([one.id, "unknown"])
    assert one.is_answered_elsewhere
    assert not hasattr(again, "is_answered_elsewhere")
    in_flight.free_slots([one])
    in_flight.remove([one])
    assert (len(in_flight), rooms(in_flight)) == (0, Room(3, 2))


def test_one_id_from_two_shards_leaves_its_room_behind() -> None:
    """A producer may send one id to two shards; if both are claimed together, one of them counts."""
    in_flight = InFlightJobs(slots=8, wanted=lambda: 8)
    before = rooms(in_flight)
    for _ in range(20):
        first, second = jobs(1, lane=Lane.BULK), jobs(1, lane=Lane.BULK)
        second[0].shard = 1
        both = [*first, *second]
        in_flight.add(both, both)
        assert in_flight.ids() == ["bulk0"]
        in_flight.free_slots(both)
        for ended in (first, second):
            in_flight.remove(ended)
        assert rooms(in_flight) == before


def test_ids_are_listed_oldest_first() -> None:
    """As `in`, iteration and length see them."""
    in_flight = InFlightJobs(slots=3)
    held = jobs(3)
    in_flight.add(held[1:], [])
    in_flight.add(held[:1], [])
    expected = [held[1].id, held[2].id, held[0].id]
    assert (in_flight.ids(), list(in_flight), len(in_flight)) == (expected, expected, 3)
    assert held[0].id in in_flight
    assert "unknown" not in in_flight


def test_no_room_is_given_while_closing() -> None:
    """A claim under way at the stop would bring more jobs."""
    in_flight = InFlightJobs(slots=3)
    assert in_flight.wait_for_room(is_quarantine_owner=False, is_closing=lambda: True, timeout_s=0.0) == NO_ROOM


def test_small_room_is_not_worth_a_claim() -> None:
    """Less than a quarter of the wanted slots waits for more, except where nothing is in flight."""
    in_flight = InFlightJobs(slots=40, shares=LoadShares(interactive_reserve=0.0))
    held = jobs(40)
    in_flight.add(held, held)
    in_flight.free_slots(held[:9])
    in_flight.remove(held[:9])
    assert room(in_flight) == 0
    in_flight.free_slots(held[9:10])
    assert room(in_flight) == 10
    one = InFlightJobs(slots=3)
    [job] = jobs(1)
    one.add([job], [job])
    assert room(one) == 2


def test_wait_for_the_end_has_three_ends() -> None:
    """Nothing is in flight, the time is over, or it is hurried; it ends immediately in each case."""
    in_flight = InFlightJobs(slots=3)
    far_s = time.monotonic() + 60.0
    in_flight.wait_until_empty(until_s=far_s, is_hurried=lambda: False)
    held = jobs(1)
    in_flight.add(held, held)
    in_flight.wait_until_empty(until_s=far_s, is_hurried=lambda: True)
    in_flight.wait_until_empty(until_s=time.monotonic() - 1.0, is_hurried=lambda: False)
    hurries = iter([False, False, True])
    in_flight.wait_until_empty(until_s=far_s, is_hurried=lambda: next(hurries))
    assert list(hurries) == []
    assert time.monotonic() < far_s


@pytest.mark.parametrize("change", ["free", "remove", "wake"])
def test_change_wakes_a_thread_that_waits_for_room(change: str) -> None:
    """A freed slot, a removed job, and `wake`, long before its time-out."""
    in_flight = InFlightJobs(slots=3)
    held = jobs(3)
    in_flight.add(held, held)
    is_closing = threading.Event()
    waits: Any = in_flight._changed
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            in_flight.wait_for_room,
            is_quarantine_owner=change == "remove",
            is_closing=is_closing.is_set,
            timeout_s=60.0,
        )
        wait_until(lambda: len(waits._waiters) == 1, timeout_s=10)
        if change == "free":
            in_flight.free_slots(held)
        elif change == "remove":
            in_flight.remove(held)
        else:
            is_closing.set()
            in_flight.wake()
        found = waiting.result(timeout=10)
    # A job that is removed without its slot leaves less than a claim is worth.
    assert found == {"free": Room(3, 2), "remove": Room(0, 0), "wake": NO_ROOM}[change]


def test_waiting_jobs_take_half_of_their_slots_for_each_lane() -> None:
    """More of them use the slots of others, and jobs of a lane that is not known to wait count as others."""
    waiting = {Lane.INTERACTIVE: 3}
    in_flight = InFlightJobs(slots=10, label_slots=4, waiting=lambda: waiting)
    held = jobs(3)
    in_flight.add(held, held)
    assert rooms(in_flight).total == 5
    waiting[Lane.INTERACTIVE] = 1
    assert rooms(in_flight).total == 4
    assert rooms(InFlightJobs(slots=10, label_slots=4)).total == 6


def test_jobs_of_a_shard_that_is_away_take_no_room() -> None:
    """They wait for a shard that is away, so others are claimed in their place, and a quarantined job may run."""
    in_flight = InFlightJobs(slots=2)
    waiting = jobs(6, lane=Lane.BULK)
    in_flight.add(waiting, [])
    assert rooms(in_flight) == Room(1, 0)
    in_flight.set_away({Lane.BULK: 6})
    assert in_flight.runs_nothing()
    assert rooms(in_flight) == Room(2, 1)
    in_flight.set_away({})
    assert rooms(in_flight) == Room(1, 0)


def test_ids_and_marks_are_those_of_one_shard() -> None:
    """Another shard has its own answer of the same id."""
    in_flight = InFlightJobs(slots=3)
    held = jobs(3)
    held[1].shard = 4
    in_flight.add(held, [])
    assert in_flight.ids_of(4) == [held[1].id]
    in_flight.mark_answered_elsewhere([job.id for job in held], shard=4)
    assert [hasattr(job, "is_answered_elsewhere") for job in held] == [False, True, False]
