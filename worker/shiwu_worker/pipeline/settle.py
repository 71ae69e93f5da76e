"""The one place where a job's fate is carried out: its answer is written, or it goes back to Redis.

While Redis is away the answers are kept and tried again; nothing is forgotten as long as the process lives.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from redis import RedisError

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.runtime.backoff import RedisBackoff

if TYPE_CHECKING:
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue
    from shiwu_worker.stages.commit import Committer

log: Any = structlog.get_logger()
T = TypeVar("T")
BATCH_LIMIT: Final = 512
"""A batch of settled jobs is closed when it holds this many; the last list that enters it may exceed this."""


class Settler:
    """A thread that commits answers and gives jobs back, many in one step.

    Args:
        on_settled: told which jobs are out of our hands.
        on_answered: told each answer: to log it, to send its callbacks and events. Must not raise.
        on_fatal: called when the thread ends by a defect.
    """

    def __init__(
        self,
        committer: Committer,
        lease_queue: LeaseQueue,
        *,
        backoff: RedisBackoff,
        on_settled: Callable[[Sequence[Job]], None],
        on_answered: Callable[[Sequence[CommittedJob]], None] | None,
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self._committer = committer
        self._lease_queue = lease_queue
        self._backoff = backoff
        self._on_settled = on_settled
        self._on_answered = on_answered
        self._on_fatal = on_fatal
        self._waiting: queue.SimpleQueue[list[Job]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, jobs: list[Job]) -> None:
        """Take jobs whose fate is known. Never blocks; bounded because what is held is."""
        self._waiting.put(jobs)

    def close(self, *, timeout_s: float) -> bool:
        """Settle what was put, for `timeout_s` at most; True when nothing is left."""
        self._ended.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._waiting.empty()

    def _run(self) -> None:
        try:
            while jobs := self._next():
                self._settle(jobs)
        except Exception as error:  # border: a worker that answers nothing must not go on
            log.exception("thread_failed", thread="commit")
            self._on_fatal(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))

    def _next(self) -> list[Job]:
        """What waits, oldest first; empty when there is nothing more to come."""
        jobs: list[Job] = []
        while len(jobs) < BATCH_LIMIT:
            try:
                jobs += self._waiting.get_nowait() if jobs else self._waiting.get(timeout=0.25)
            except queue.Empty:
                if jobs or self._ended.is_set():
                    break
        return jobs

    def _settle(self, jobs: list[Job]) -> None:
        answered = [job for job in jobs if job.back is None]
        entries = self._committer.finish(answered, now_s=time.monotonic())
        if entries:
            written = self._until_done(lambda: self._committer.commit(entries), jobs=len(entries))
            if written is not None:
                again, commit_s = written
                self._on_settled(answered)
                if self._on_answered is not None:
                    pairs = zip(answered, entries, strict=True)
                    self._on_answered([CommittedJob(job, one, commit_s, one.id not in again) for job, one in pairs])
        # Apart from the answers, which a server that refuses the one may take.
        if back := [job for job in jobs if job.back is not None]:
            releases = [job.back for job in back if job.back is not None]
            if self._until_done(lambda: self._lease_queue.release(releases), jobs=len(back)) is not None:
                self._on_settled(back)

    def _until_done(self, write: Callable[[], T], *, jobs: int) -> tuple[T, float] | None:
        """What Redis said and how long it took in seconds; None when we end before it says anything."""
        while True:
            started_s = time.monotonic()
            try:
                said = write()
            except RedisError as error:
                if self._ended.is_set():
                    # The leases of these jobs end with us, and another worker answers them.
                    log.error("answers_not_committed", jobs=jobs, error=str(error)[:300])
                    return None
                self._backoff.wait(error, self._ended)
            else:
                self._backoff.back()
                return said, time.monotonic() - started_s
