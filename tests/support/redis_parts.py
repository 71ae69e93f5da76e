"""The worker's parts that speak to Redis, each with short arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.cancel import cancel_steps
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.message_writer import build_message
from shiwu.broker.retention import Retention
from shiwu.broker.server_clock import server_time_steps
from shiwu.broker.steps import Steps, iterate, run
from shiwu.client.dead_letters import DeadFilter, DeadLetter, DeadPages, drop_steps, requeue_steps, show_steps
from shiwu.contract import (
    MARKS,
    Answer,
    Lane,
    Request,
    Status,
    done_key,
)
from shiwu_worker.jobs.job import Claimed
from shiwu_worker.policy.limits import LeaseOptions
from shiwu_worker.stages.claim.lease_queue import LeaseQueue

T = TypeVar("T")
REQUEST = Request(image="s3://pictures/cat.jpg")
LANES = [(lane, key) for lane in Lane for key in lane.keys]
"""Every lane with each of its keys."""


def forget_mark(client: redis.Redis, job_id: str) -> None:
    """Delete the mark of an answered id in both forms, as when it has expired."""
    client.delete(done_key(job_id))
    for key in MARKS:
        client.hdel(key, job_id)


def message(job_id: str, lane: Lane = Lane.INTERACTIVE, *, answer_by_ms: float | None = None) -> bytes:
    """A message of our own client."""
    return build_message(REQUEST, job_id=job_id, lane=lane, answer_by_ms=answer_by_ms)


def make_lease_queue(client: redis.Redis, name: str, *, lease_s: float = 60.0, bulk_share: float = 0.1) -> LeaseQueue:
    """One worker's claims."""
    return LeaseQueue(client, LeaseOptions(lease_s=lease_s, bulk_share=bulk_share), token=name)


def make_answer_store(client: redis.Redis, name: str) -> AnswerStore:
    """One worker's writer of answers."""
    return AnswerStore(
        client, token=name, retention=lambda: Retention(result_ttl_s=60, done_ttl_s=120, dead_length=1000)
    )


def make_maintenance(
    client: redis.Redis, name: str = "", *, stream_length: int = 100_000, **limits: int
) -> Maintenance:
    """Maintenance with test settings."""
    token = name or "sweep"
    return Maintenance(
        client,
        make_answer_store(client, token),
        name=name,
        token=token,
        retention=lambda: Retention(stream_length=stream_length, **limits),
    )


def cancel(client: redis.Redis, *ids: str, retention: Retention | None = None) -> list[str]:
    """A client cancels jobs; the ids that had no answer before."""
    limits = retention or Retention(result_ttl_s=60, done_ttl_s=120, dead_length=1000)
    return run(client, cancel_steps(ids, reason="", clock=server_time_steps, limits=lambda: known(limits)))


class DeadLetters:
    """Dead letters, as a client reads, requeues and drops them."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def read(self, where: DeadFilter | None = None, *, limit: int | None = None) -> Iterator[DeadLetter]:
        """Dead letters, newest first."""
        return iterate(self._client, DeadPages(where or DeadFilter(), limit=limit).next_steps)

    def show(self, job_id: str) -> DeadLetter | None:
        """One dead letter, or None."""
        return run(self._client, show_steps(job_id))

    def requeue(self, job_ids: Iterable[str]) -> list[str]:
        """Requeue them; the ids of those that were requeued."""
        return run(self._client, requeue_steps(job_ids))

    def drop(self, job_ids: Iterable[str]) -> int:
        """Delete them; how many were deleted."""
        return run(self._client, drop_steps(job_ids))


def known(value: T) -> Steps[T]:
    """Steps that ask nothing."""
    yield from ()
    return value


def answer(job: Claimed) -> AnswerEntry:
    """The job's answer."""
    tagged = Answer(id=job.id, status=Status.TAGGED, attempts=job.attempt)
    return AnswerEntry(id=job.id, answer=tagged, generation=job.generation)
