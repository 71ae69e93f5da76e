"""Jobs in flight: how many are claimed follows the size of the current batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shiwu_worker.pipeline.in_flight import MAX_JOBS_PER_SLOT, InFlightJobs


def jobs(count: int, *, first: int = 0) -> list[Any]:
    """Jobs without a slot."""
    return [SimpleNamespace(id=f"{n}", slot=-1) for n in range(first, first + count)]


def room(in_flight: InFlightJobs, *, owns_quarantine: bool = False) -> int:
    """How many jobs would be claimed, without waiting."""
    return in_flight.wait_for_room(owns_quarantine=owns_quarantine, is_closing=lambda: False, timeout_s=0.0)


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
    assert room(in_flight, owns_quarantine=True) == 0
    in_flight.free_slots(held)
    in_flight.remove(held)
    assert room(in_flight, owns_quarantine=True) == 10
