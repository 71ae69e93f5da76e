"""The jobs of a backfill whose answers are not written yet, in the memory of the process that runs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

MAX_PORTION: Final = 1000
"""Jobs that are registered and sent in one step."""
MAX_RECENT: Final = 100_000
"""Jobs that are remembered in case Redis loses their portions; about 10 MB."""


class OpenJobs:
    """Ids and references of open jobs. Some have an answer that is in a part which is not complete yet."""

    def __init__(self) -> None:
        self._references: dict[str, str] = {}
        self._answered: set[str] = set()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._references

    def open(self, jobs: Iterable[tuple[str, str]]) -> None:
        """Add (id, reference) pairs."""
        self._references.update(jobs)

    def reference(self, job_id: str) -> str:
        """The reference of an open job."""
        return self._references[job_id]

    def answer(self, job_id: str) -> bool:
        """Record an answer; False where the job is not open, or has one."""
        if job_id not in self._references or job_id in self._answered:
            return False
        self._answered.add(job_id)
        return True

    def close(self, job_ids: Iterable[str]) -> None:
        """Remove jobs whose answers are written."""
        for job_id in job_ids:
            del self._references[job_id]
            self._answered.discard(job_id)

    @property
    def unanswered(self) -> int:
        """How many have no answer."""
        return len(self._references) - len(self._answered)

    def without_answer(self) -> Iterator[str]:
        """Yield the ids of those that have no answer."""
        return (job_id for job_id in self._references if job_id not in self._answered)


class RecentJobs:
    """The newest portions of this process. Where Redis loses one, its jobs may be answered and have no row."""

    def __init__(self) -> None:
        self._portions: deque[tuple[int, Sequence[str]]] = deque()
        self._count = 0
        self.lost: set[str] = set()
        """Jobs whose portions Redis has lost, and that are not registered again yet."""

    def register(self, portion: int, job_ids: Sequence[str]) -> None:
        """Add the next portion."""
        self.lost.difference_update(job_ids)
        self._portions.append((portion, job_ids))
        self._count += len(job_ids)
        while self._count > MAX_RECENT:
            self._count -= len(self._portions.popleft()[1])

    def set_back(self, portion: int) -> None:
        """Record that Redis knows no later portion than this one."""
        while self._portions and self._portions[-1][0] > portion:
            job_ids = self._portions.pop()[1]
            self._count -= len(job_ids)
            self.lost.update(job_ids)
