"""What a worker holds: how much it claims follows the batches that it makes now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shiwu_worker.pipeline.in_flight import HELD_FACTOR, InFlightJobs


def jobs(count: int, *, first: int = 0) -> list[Any]:
    """Jobs without a slot."""
    return [SimpleNamespace(id=f"{n}", slot=-1) for n in range(first, first + count)]


def room(hands: InFlightJobs) -> int:
    """What it would claim, without waiting."""
    return hands.wait_room(is_alone=False, is_closing=lambda: False, timeout_s=0.0)


def test_room_follows_the_batches_of_now() -> None:
    """With small batches the backlog stays in Redis; with larger ones more slots are used, never too many."""
    wanted = [10]
    hands = InFlightJobs(slots=100, wanted=lambda: wanted[0])
    assert room(hands) == 10
    held = jobs(8)
    hands.take(held, held)
    assert room(hands) == 2
    wanted[0] = 40
    assert room(hands) == 32
    wanted[0] = 4
    assert room(hands) == 0
    wanted[0] = 1000
    assert room(hands) == 92
    hands.free_slots(held)
    hands.remove(held)
    assert room(hands) == 100


def test_answers_that_redis_does_not_take_leave_no_room() -> None:
    """They hold no slot, and are held all the same."""
    hands = InFlightJobs(slots=100, wanted=lambda: 10)
    hands.take(jobs(HELD_FACTOR * 10), [])
    assert room(hands) == 0
