"""The jobs in flight: those between claim and commit, the slots of their pixels, and the room for more."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shiwu_worker.jobs.job import Job

POLL_INTERVAL_S: Final = 0.1
MAX_JOBS_PER_SLOT: Final = 3
"""Jobs between claim and commit are at most this many times the slots."""


class InFlightJobs:
    """Thread-safe. As a collection it holds the ids of the jobs, the oldest first.

    Args:
        slots: images whose pixels there is room for.
        wanted: how many of the slots the current batches need. The rest of the jobs waits in Redis for any worker.
    """

    def __init__(self, *, slots: int, wanted: Callable[[], int] | None = None) -> None:
        self._slots = slots
        self._wanted_slots = wanted or (lambda: slots)
        self._jobs: dict[str, Job] = {}
        self._free = list(range(slots))
        self._loading: dict[int, Job] = {}
        self._tickets = itertools.count(1)
        self._changed = threading.Condition()

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    def __len__(self) -> int:
        return len(self._jobs)

    def ids(self) -> list[str]:
        """Ids of the jobs in flight, the oldest first."""
        with self._changed:
            return list(self._jobs)

    def jobs(self) -> list[Job]:
        """The jobs in flight, the oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def add(self, jobs: Sequence[Job], to_load: Sequence[Job]) -> list[tuple[int, Job]]:
        """Add claimed jobs, and give each one of `to_load` a slot; return these with a ticket for the loaders.

        A job whose earlier attempt is still in flight is not added.
        """
        with self._changed:
            self._jobs.update((job.id, job) for job in jobs if job.id not in self._jobs)
            for job in to_load:
                job.slot = self._free.pop()
            tickets = [(next(self._tickets), job) for job in to_load]
            self._loading.update(tickets)
        return tickets

    def match(self, tickets: Sequence[int]) -> list[Job | None]:
        """The jobs of these tickets; each ticket gives its job once."""
        with self._changed:
            return [self._loading.pop(ticket, None) for ticket in tickets]

    def free_slots(self, jobs: Sequence[Job]) -> None:
        """Take back the slots of jobs whose attempt has ended."""
        with self._changed:
            self._free.extend(job.slot for job in jobs if job.slot >= 0)
            self._changed.notify_all()

    def mark_answered_elsewhere(self, ids: Sequence[str]) -> None:
        """Mark jobs that another process has answered."""
        with self._changed:
            for job_id in ids:
                if (job := self._jobs.get(job_id)) is not None:
                    job.is_answered_elsewhere = True

    def remove(self, jobs: Sequence[Job]) -> None:
        """Remove jobs of which Redis has the answers, or the messages. Another attempt with the same id stays."""
        with self._changed:
            for job in jobs:
                if self._jobs.get(job.id) is job:
                    del self._jobs[job.id]
            self._changed.notify_all()

    def wait_for_room(self, *, owns_quarantine: bool, is_closing: Callable[[], bool], timeout_s: float) -> int:
        """How many jobs to claim, as soon as there are enough for a round trip; 0 when the time is over before.

        Jobs that wait for their commit hold no slots, so the number of jobs is bounded too.

        Args:
            owns_quarantine: wait until nothing is in flight, because a quarantined job runs alone.
        """

        def wanted() -> int:
            return min(self._slots, self._wanted_slots())

        def room() -> int:
            used = self._slots - len(self._free)
            return min(wanted() - used, MAX_JOBS_PER_SLOT * wanted() - len(self._jobs))

        def has_room() -> bool:
            return is_closing() or not self._jobs or (room() >= max(1, wanted() // 4) and not owns_quarantine)

        with self._changed:
            self._changed.wait_for(has_room, timeout_s)
            return 0 if is_closing() or (owns_quarantine and self._jobs) else max(0, room())

    def wait_until_empty(self, *, until_s: float, is_hurried: Callable[[], bool]) -> None:
        """Wait until nothing is in flight, at the latest until this time of the monotonic clock."""
        with self._changed:
            # Short waits: a signal handler may interrupt the thread that holds the lock, so it cannot notify.
            while self._jobs and not is_hurried() and time.monotonic() < until_s:
                self._changed.wait(POLL_INTERVAL_S)

    def wake(self) -> None:
        """Let waiting threads check their conditions again."""
        with self._changed:
            self._changed.notify_all()
