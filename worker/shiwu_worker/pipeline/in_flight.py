"""The jobs in flight: those between claim and commit, the slots of their pixels, and the room for more."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from shiwu.contract import Lane
from shiwu_worker.policy.limits import LoadShares

if TYPE_CHECKING:
    from shiwu_worker.jobs.job import Job

POLL_INTERVAL_S: Final = 0.1
MAX_JOBS_PER_SLOT: Final = 3
"""Jobs between claim and commit are at most this many times the slots."""


class Room(NamedTuple):
    """How many jobs to claim."""

    total: int
    bulk: int
    """At most so many of them from bulk."""


NO_ROOM: Final = Room(0, 0)


class InFlightJobs:
    """Thread-safe. As a collection it holds the ids of the jobs, the oldest first.

    Args:
        slots: images whose pixels there is room for.
        wanted: how many of the slots the current batches need. The rest of the jobs waits in Redis for any worker.
        shares: which share of them bulk never gets, so that a claim has room for interactive however slow bulk is.
        label_slots: how many of the slots are for jobs that wait for labels, half of them for each lane. These jobs
            take no room from others.
        waiting: how many jobs of each lane wait for labels now.
    """

    def __init__(
        self,
        *,
        slots: int,
        wanted: Callable[[], int] | None = None,
        shares: LoadShares = LoadShares(),  # noqa: B008 frozen
        label_slots: int = 0,
        waiting: Callable[[], Mapping[Lane, int]] = lambda: {},
    ) -> None:
        self._slots = slots
        self._shares = shares
        self._bulk_jobs = self._bulk_slots = 0
        self._away_jobs = self._away_bulk = 0
        self._on_bulk_room: Callable[[], None] | None = None
        self._label_slots = label_slots
        self._waiting = waiting
        self._wanted_slots = wanted or (lambda: slots - label_slots)
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
            # One of each id: a producer may have sent an id to two shards, whose jobs come together.
            new = {job.id: job for job in jobs if job.id not in self._jobs}
            self._jobs.update(new)
            self._bulk_jobs += _bulk_count(new.values())
            for job in to_load:
                job.slot = self._free.pop()
            self._bulk_slots += _bulk_count(to_load)
            tickets = [(next(self._tickets), job) for job in to_load]
            self._loading.update(tickets)
        return tickets

    def load_again(self, jobs: Sequence[Job]) -> list[tuple[int, Job]]:
        """Give jobs that have slots new tickets for the loaders."""
        with self._changed:
            tickets = [(next(self._tickets), job) for job in jobs]
            self._loading.update(tickets)
        return tickets

    def match(self, tickets: Sequence[int]) -> list[Job | None]:
        """The jobs of these tickets; each ticket gives its job once."""
        with self._changed:
            return [self._loading.pop(ticket, None) for ticket in tickets]

    def free_slots(self, jobs: Sequence[Job]) -> None:
        """Take back the slots of jobs whose attempt has ended."""
        with self._changed:
            freed = [job for job in jobs if job.slot >= 0]
            self._free.extend(job.slot for job in freed)
            self._bulk_slots -= _bulk_count(freed)
            self._note_change()

    def ids_of(self, shard: int) -> list[str]:
        """Ids of the jobs in flight that came from this shard, the oldest first."""
        with self._changed:
            return [job_id for job_id, job in self._jobs.items() if job.shard == shard]

    def mark_answered_elsewhere(self, ids: Sequence[str], *, shard: int = 0) -> None:
        """Mark jobs that another process has answered in this shard."""
        with self._changed:
            for job_id in ids:
                if (job := self._jobs.get(job_id)) is not None and job.shard == shard:
                    job.is_answered_elsewhere = True

    def runs_nothing(self) -> bool:
        """Whether no job is in flight but those that `set_away` is about."""
        return len(self._jobs) <= self._away_jobs

    def set_away(self, waiting: Mapping[Lane, int]) -> None:
        """Let jobs take no room that wait for the commit to a shard that is away.

        Args:
            waiting: how many of each lane. No more are claimed from such a shard, so they are bounded.
        """
        with self._changed:
            self._away_jobs, self._away_bulk = sum(waiting.values()), waiting.get(Lane.BULK, 0)
            self._note_change()

    def remove(self, jobs: Sequence[Job]) -> None:
        """Remove jobs of which Redis has the answers, or the messages. Another attempt with the same id stays."""
        bulk = Lane.BULK  # once: up to Python 3.11 a member of an enum is found by a call
        with self._changed:
            for job in jobs:
                if self._jobs.get(job.id) is job:
                    del self._jobs[job.id]
                    self._bulk_jobs -= job.lane is bulk
            self._note_change()

    def wait_for_room(self, *, is_quarantine_owner: bool, is_closing: Callable[[], bool], timeout_s: float) -> Room:
        """How many jobs to claim, as soon as there are enough for a round trip; none when the time is over before.

        Jobs that wait for their commit hold no slots, so the number of jobs is bounded too.

        Args:
            is_quarantine_owner: wait until nothing is in flight, because a quarantined job runs alone.
        """

        def has_room() -> bool:
            return is_closing() or self.runs_nothing() or (self._room().total > 0 and not is_quarantine_owner)

        with self._changed:
            self._changed.wait_for(has_room, timeout_s)
            return NO_ROOM if is_closing() or (is_quarantine_owner and not self.runs_nothing()) else self._room()

    def call_on_bulk_room(self, notify: Callable[[], None]) -> bool:
        """Call `notify` once, from any thread, when bulk has room; False, without a call, if it has room now."""
        with self._changed:
            if self._room().bulk > 0:
                return False
            self._on_bulk_room = notify
            return True

    def _room(self) -> Room:
        """The room as it is now, 0 where it is too small for a round trip. The caller holds the lock."""
        usable = self._slots - self._label_slots
        wanted = min(usable, self._wanted_slots())
        reserve = self._shares.reserve_of(wanted)
        aside = {lane: min(count, self._label_slots // len(Lane)) for lane, count in self._waiting().items()}
        bulk_aside = aside.get(Lane.BULK, 0)
        running = len(self._jobs) - self._away_jobs
        jobs, used = running - sum(aside.values()), self._slots - len(self._free) - sum(aside.values())
        bulk_jobs, bulk_used = self._bulk_jobs - self._away_bulk - bulk_aside, self._bulk_slots - bulk_aside
        total = _worth_a_claim(min(wanted - used, MAX_JOBS_PER_SLOT * wanted - jobs), wanted, is_empty=running <= 0)
        # Also while bulk has more than its part, as it had a right to before batches became smaller.
        own = min(reserve - (used - bulk_used), MAX_JOBS_PER_SLOT * reserve - (jobs - bulk_jobs), usable - used)
        total = max(total, own)
        for_bulk = wanted - reserve
        bulk = min(for_bulk - bulk_used, MAX_JOBS_PER_SLOT * for_bulk - bulk_jobs)
        is_without_bulk = self._bulk_jobs - self._away_bulk <= 0
        return Room(total, min(total, _worth_a_claim(bulk, for_bulk, is_empty=is_without_bulk)))

    def _note_change(self) -> None:
        """Wake the threads that wait for room. The caller holds the lock."""
        self._changed.notify_all()
        if self._on_bulk_room is not None and self._room().bulk > 0:
            notify, self._on_bulk_room = self._on_bulk_room, None
            notify()

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


def _bulk_count(jobs: Iterable[Job]) -> int:
    return [job.lane for job in jobs].count(Lane.BULK)


def _worth_a_claim(room: int, wanted: int, *, is_empty: bool) -> int:
    """The room, or 0 where it is less than a quarter: a claim is a round trip."""
    return max(0, room) if is_empty or room >= max(1, wanted // 4) else 0
