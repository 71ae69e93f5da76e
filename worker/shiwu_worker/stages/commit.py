"""Answers → Redis, with the acknowledgement, in one step.

The step itself is the ledger's: producers that cancel and the sweep take the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import Status
from shiwu_worker.jobs.job import Job

_KEPT = {Status.REJECTED, Status.FAILED}


class Committer:
    """Turns jobs into answers and writes them. Thread-safe.

    Args:
        worker: stands in every answer.
    """

    def __init__(self, answer_store: AnswerStore, *, worker: str) -> None:
        self._answer_store = answer_store
        self._worker = worker

    def finish(self, jobs: Sequence[Job], *, now_s: float) -> list[AnswerEntry]:
        """The answers of these jobs; times end when the tags were made, or at `now_s`."""
        if not jobs:
            return []
        answered_at = jobs[0].server_time(now_s)
        return [self._entry(job, job.scored_s or now_s, answered_at) for job in jobs]

    def commit(self, entries: Sequence[AnswerEntry]) -> set[str]:
        """Write answers; return the ids that somebody had answered before.

        Raises:
            redis.RedisError: and then the same answers may be written again.
        """
        return self._answer_store.write(entries)

    def _entry(self, job: Job, until_s: float, answered_at: datetime) -> AnswerEntry:
        is_dead = job.status in _KEPT
        return AnswerEntry(
            answer=job.answer(worker=self._worker, until_s=until_s, answered_at=answered_at),
            id=job.answer_id or job.id,
            claim=job.id if job.answer_id else "",
            ignore_result=job.ignore_result,
            message=job.key.encode() + b"|" + job.raw if is_dead or job.has_callbacks else b"",
            is_dead=is_dead,
            has_callbacks=job.has_callbacks,
        )
