"""Commit: writes answers to Redis and ends their claims in one step; releases the jobs that have no answer.

Interactive and bulk jobs have commits of their own, in turns where both wait, so that large bulk answers do not hold up
interactive ones.

While Redis is unavailable, jobs are kept and their commit is tried again for as long as the process runs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from redis import RedisError

from shiwu.broker.answers import AnswerEntry, AnswerStore, dead_message
from shiwu.contract import Lane, Status
from shiwu_worker.errors import FatalError
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.outcome import Answered, CommittedJob, Outcome, Released
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.runtime.backoff import RedisBackoff

log: FilteringBoundLogger = structlog.get_logger()
T = TypeVar("T")
MAX_BATCH: Final = 512
"""Jobs of one commit."""
MAX_BULK_BYTES: Final = 256 * 1024
"""Answers of one commit of bulk jobs, about; at least one. Interactive answers wait for one such commit at most."""
_ANSWER_BYTES: Final = 512
_TAG_BYTES: Final = 64
_NUMBER_BYTES: Final = 10
"""Of an answer without its tags, of a tag without its label, and of a number of an embedding, as JSON."""
_FEW_TAGS: Final = 16
"""Answers with so many tags and nothing else are not measured: they are small, and almost all are like this."""
POLL_INTERVAL_S: Final = 0.25
_DEAD_LETTER: Final = frozenset({Status.REJECTED, Status.FAILED})


class Committer:
    """A thread that commits answers and releases jobs, many in one step.

    Args:
        worker: the name that stands in every answer.
        release: gives jobs back to Redis; raises redis.RedisError, and may then be called again with the same jobs.
        backoff: the pauses while Redis is unavailable.
        on_fatal: called when the thread ends by a defect.
        shard: index of the shard of the store; stands in the name of the thread.
    """

    def __init__(
        self,
        answer_store: AnswerStore,
        *,
        worker: str,
        release: Callable[[Sequence[Release]], int],
        backoff: RedisBackoff,
        on_fatal: Callable[[FatalError], None],
        shard: int = 0,
    ) -> None:
        self._answer_store = answer_store
        self._worker = worker
        self._release = release
        self._backoff = backoff
        self._on_committed: Callable[[Sequence[CommittedJob]], None] = lambda _: None
        self._on_released: Callable[[Sequence[Released]], None] = lambda _: None
        self._waiting: queue.SimpleQueue[Sequence[Outcome]] = queue.SimpleQueue()
        self._lanes: dict[Lane, deque[Outcome]] = {lane: deque() for lane in Lane}
        """What was taken from `_waiting`. For the thread."""
        self._last_lane = Lane.BULK
        self._closing = threading.Event()
        self.thread = ServiceThread(
            f"commit-{shard}" if shard else "commit", self._run, on_fatal=on_fatal, stop=self._closing.set
        )

    def start(
        self,
        *,
        on_committed: Callable[[Sequence[CommittedJob]], None],
        on_released: Callable[[Sequence[Released]], None],
    ) -> None:
        """Start the thread.

        Args:
            on_committed: gets the jobs whose answers Redis has. Called on the thread; must not raise or block.
            on_released: gets the jobs that Redis has back. Called on the thread; must not raise or block.
        """
        self._on_committed, self._on_released = on_committed, on_released
        self.thread.start()

    def put(self, outcomes: Sequence[Outcome]) -> None:
        """Take jobs whose attempt has ended. Never blocks; bounded, because jobs in flight are."""
        self._waiting.put(outcomes)

    def close(self, *, timeout_s: float) -> bool:
        """Commit what was put, for `timeout_s` at most; True when nothing is left."""
        return self.thread.close(timeout_s) and self._waiting.empty() and not any(self._lanes.values())

    def _run(self) -> None:
        while outcomes := self._next():
            answered = [outcome.job for outcome in outcomes if isinstance(outcome, Answered)]
            self._commit(answered)
            # Apart from the answers: a server may take the one and refuse the other.
            if len(answered) < len(outcomes):
                self._give_back([outcome for outcome in outcomes if isinstance(outcome, Released)])

    def _next(self) -> list[Outcome]:
        """What one commit takes, oldest first; empty when nothing waits and the thread is to end."""
        self._sort_waiting()
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        is_bulk_turn = not interactive or (bool(bulk) and self._last_lane is Lane.INTERACTIVE)
        self._last_lane = Lane.BULK if is_bulk_turn else Lane.INTERACTIVE
        left = self._lanes[self._last_lane]
        outcomes: list[Outcome] = []
        size = 0
        while left and len(outcomes) < MAX_BATCH and (not is_bulk_turn or size < MAX_BULK_BYTES):
            outcomes.append(left.popleft())
            size += _answer_bytes(outcomes[-1])
        return outcomes

    def _sort_waiting(self) -> None:
        """Take all that was put; wait for it where nothing is left."""
        while True:
            try:
                if any(self._lanes.values()):
                    outcomes = self._waiting.get_nowait()
                else:
                    outcomes = self._waiting.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                if self._closing.is_set() or any(self._lanes.values()):
                    return
            else:
                for outcome in outcomes:
                    self._lanes[outcome.job.lane].append(outcome)

    def _commit(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        entries = to_entries(jobs, worker=self._worker, now_s=time.monotonic())
        written = self._until_done(lambda: self._answer_store.write(entries), jobs=len(entries))
        if written is not None:
            answered_before, commit_s = written
            self._on_committed(
                [
                    CommittedJob(job, entry, commit_s, entry.id not in answered_before)
                    for job, entry in zip(jobs, entries, strict=True)
                ]
            )

    def _give_back(self, released: Sequence[Released]) -> None:
        releases = [outcome.release for outcome in released]
        if self._until_done(lambda: self._release(releases), jobs=len(releases)) is not None:
            self._on_released(released)

    def _until_done(self, write: Callable[[], T], *, jobs: int) -> tuple[T, float] | None:
        """The reply of Redis and its duration in seconds; None when the thread has to end before there is one."""
        while True:
            started_s = time.monotonic()
            try:
                reply = write()
            except RedisError as error:
                if self._closing.is_set():
                    # The leases of these jobs expire with this process, and another worker answers them.
                    log.error("answers_not_committed", jobs=jobs, error=str(error)[:300])
                    return None
                self._backoff.wait(error, self._closing)
            else:
                self._backoff.reset()
                return reply, time.monotonic() - started_s


def _answer_bytes(outcome: Outcome) -> int:
    """About how large the answer will be."""
    job = outcome.job
    tags, embedding = job.tags or (), job.embedding or ()
    if len(tags) <= _FEW_TAGS and not embedding:
        return _ANSWER_BYTES
    labels = sum(len(tag.label) for tag in tags)
    # Most characters of labels that are not ASCII have three bytes.
    return _ANSWER_BYTES + _TAG_BYTES * len(tags) + 3 * labels + _NUMBER_BYTES * len(embedding)


def to_entries(jobs: Sequence[Job], *, worker: str, now_s: float) -> list[AnswerEntry]:
    """The answers of these jobs. Their times end when the tags were made, or at `now_s`."""
    if not jobs:
        return []
    answered_at = jobs[0].server_time(now_s)
    return [to_entry(job, worker=worker, until_s=job.scored_s or now_s, answered_at=answered_at) for job in jobs]


def to_entry(job: Job, *, worker: str, until_s: float, answered_at: datetime) -> AnswerEntry:
    """The answer of a job, with what the commit keeps of its message: for dead letters and callbacks."""
    is_dead = job.status in _DEAD_LETTER
    return AnswerEntry(
        answer=job.answer(worker=worker, until_s=until_s, answered_at=answered_at),
        id=job.answer_id or job.id,
        claim=job.id if job.answer_id else "",
        ignore_result=job.ignore_result,
        message=dead_message(job.key, job.raw) if is_dead or job.has_callbacks else b"",
        is_dead=is_dead,
        has_callbacks=job.has_callbacks,
        has_reply_to=job.has_reply_to,
        generation=job.generation,
    )
