"""What a worker holds: jobs between claim and commit, the slots that their pixels take, and the room for more."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shiwu_worker.jobs.job import Job

POLL_INTERVAL_S: Final = 0.1
HELD_FACTOR: Final = 3
"""Jobs between claim and commit are at most this many times the slots."""


class InFlightJobs:
    """Thread-safe. Used as a collection it holds the ids of the jobs."""

    def __init__(self, *, slots: int, wanted: Callable[[], int] | None = None) -> None:
        self._slots = slots
        self._wanted = wanted or (lambda: slots)
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
        """Ids of the jobs between claim and commit, oldest first."""
        with self._changed:
            return list(self._jobs)

    def jobs(self) -> list[Job]:
        """The jobs themselves, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def take(self, jobs: Sequence[Job], loading: Sequence[Job]) -> list[tuple[int, Job]]:
        """Hold new jobs; give a slot and a ticket to each one that is to be loaded."""
        with self._changed:
            self._jobs.update((job.id, job) for job in jobs if job.id not in self._jobs)
            for job in loading:
                job.slot = self._free.pop()
            tickets = [(next(self._tickets), job) for job in loading]
            self._loading.update(tickets)
        return tickets

    def loaded(self, tickets: Sequence[int]) -> list[Job | None]:
        """The jobs of these tickets, each once."""
        with self._changed:
            return [self._loading.pop(ticket, None) for ticket in tickets]

    def free_slots(self, jobs: Sequence[Job]) -> None:
        """Take back the slots of jobs whose fate is known."""
        with self._changed:
            self._free.extend(job.slot for job in jobs if job.slot >= 0)
            self._changed.notify_all()

    def end(self, ids: Sequence[str]) -> None:
        """Mark jobs that somebody else has answered."""
        with self._changed:
            for job_id in ids:
                if (job := self._jobs.get(job_id)) is not None:
                    job.is_answered_elsewhere = True

    def remove(self, jobs: Sequence[Job]) -> None:
        """Forget jobs: Redis has their answers, or has them back. Another life of the same id stays."""
        with self._changed:
            for job in jobs:
                if self._jobs.get(job.id) is job:
                    del self._jobs[job.id]
            self._changed.notify_all()

    def wait_room(self, *, is_alone: bool, is_closing: Callable[[], bool], timeout_s: float) -> int:
        """How many jobs to claim, once there are enough to be worth a round trip; 0 when the wait was in vain.

        Answers that Redis does not take hold no slots, so what is held is bounded too.

        Args:
            is_alone: wait until nothing is held: a suspect is worked on with no neighbours.
        """

        def wanted() -> int:
            return min(self._slots, self._wanted())

        def room() -> int:
            used = self._slots - len(self._free)
            return min(wanted() - used, HELD_FACTOR * wanted() - len(self._jobs))

        with self._changed:
            self._changed.wait_for(
                lambda: is_closing() or not self._jobs or (room() >= max(1, wanted() // 4) and not is_alone), timeout_s
            )
            return 0 if is_closing() or (is_alone and self._jobs) else max(0, room())

    def wait_empty(self, *, until_s: float, is_hurried: Callable[[], bool]) -> None:
        """Wait until nothing is held, at the latest until this moment of the monotonic clock."""
        with self._changed:
            # Short waits: a signal handler may not notify, it could interrupt the very thread that holds the lock.
            while self._jobs and not is_hurried() and time.monotonic() < until_s:
                self._changed.wait(POLL_INTERVAL_S)

    def wake(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._changed.notify_all()
