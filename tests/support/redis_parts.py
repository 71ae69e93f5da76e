"""The worker's parts that speak to Redis, each with short arguments."""

from __future__ import annotations

import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.message_writer import build_message
from shiwu.broker.retention import Retention
from shiwu.contract import (
    Answer,
    Lane,
    Request,
    Status,
)
from shiwu_worker.jobs.job import Claimed
from shiwu_worker.policy.limits import LeaseOptions
from shiwu_worker.stages.claim.lease_queue import LeaseQueue

REQUEST = Request(image="s3://pictures/cat.jpg")
LANES = [(lane, key) for lane in Lane for key in lane.keys]
"""Every lane with each of its keys."""


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


def answer(job: Claimed) -> AnswerEntry:
    """The job's answer."""
    tagged = Answer(id=job.id, status=Status.TAGGED, attempts=job.attempt)
    return AnswerEntry(id=job.id, answer=tagged, generation=job.generation)
