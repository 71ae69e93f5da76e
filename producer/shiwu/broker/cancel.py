"""Answers jobs `cancelled` for their producer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final

from shiwu.broker.answers import AnswerEntry, commit_steps
from shiwu.broker.chunks import chunks
from shiwu.broker.retention import Retention
from shiwu.broker.steps import Steps
from shiwu.contract import Answer, ErrorCode, ErrorInfo, Stage, Status, moment

CANCEL_CHUNK_SIZE: Final = 500
"""Jobs that one script cancels."""


def cancel_steps(
    ids: Sequence[str], *, reason: str, clock: Callable[[], Steps[float]], limits: Callable[[], Steps[Retention]]
) -> Steps[list[str]]:
    """Answer any number of jobs `cancelled`; return the ids that had no answer before.

    After a redis.RedisError some jobs may be cancelled; cancelling again is safe.

    Args:
        clock: asks for Redis' clock in ms since 1970.
        limits: asks how long answers, marks of answered ids and dead letters are kept.
    """
    cancelled: list[str] = []
    for portion in chunks(ids, CANCEL_CHUNK_SIZE):
        now_ms = yield from clock()
        retention = yield from limits()
        entries = [_cancelled_entry(job_id, reason, now_ms=now_ms) for job_id in portion]
        # A token of this call: an id that an earlier call answered must not pass for a repeated write.
        token = f"cancel.{secrets.token_hex(4)}"
        answered = yield from commit_steps(entries, token=token, retention=retention)
        cancelled += [job_id for job_id in portion if job_id not in answered]
    return cancelled


def _cancelled_entry(job_id: str, reason: str, *, now_ms: float) -> AnswerEntry:
    """The answer for a job that a producer cancels."""
    text = f"cancelled by its producer{': ' if reason else ''}{reason:.200}"
    error = ErrorInfo(code=ErrorCode.CANCELLED, message=text, stage=Stage.CLAIM)
    answer = Answer(id=job_id, status=Status.CANCELLED, attempts=0, error=error, answered_at=moment(now_ms))
    return AnswerEntry(id=job_id, answer=answer, is_from_outside=True)
