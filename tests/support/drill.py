"""Count by id: what was sent, what was answered, and how often, whatever died in between."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from shiwu.broker.message_writer import build_message
from shiwu.contract import CLAIMS, COUNTERS, LEASES, RESULT_STREAM, Answer, Lane, Request, result_key
from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Count:
    """The promise in numbers: enqueued equals answered, and `twice` and `lost` are 0.

    `statuses` and `attempts` tell how many answers have which status and took how many tries.
    """

    enqueued: int
    answered: int
    twice: int
    lost: int
    reaped: int
    discarded: int
    statuses: dict[str, int]
    attempts: dict[int, int]


def enqueue(
    client: redis.Redis,
    images: Sequence[str],
    *,
    count: int,
    prefix: str,
    random_from: random.Random,
    lanes: Sequence[Lane] = tuple(Lane),
) -> list[str]:
    """Send `count` jobs to these lanes in pipelined batches and return their ids."""
    ids = [f"{prefix}-{number}" for number in range(count)]
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            lane = random_from.choice(lanes)
            request = Request(image=random_from.choice(images))
            pipe.lpush(lane.queue, build_message(request, job_id=job_id, lane=lane))
        pipe.execute()
    return ids


def answered(client: redis.Redis) -> int:
    """Answers so far, of all workers."""
    return int(client.hget(COUNTERS, "answered") or 0)


def wait_answered(client: redis.Redis, ids: Sequence[str], *, timeout_s: float) -> None:
    """Wait until every id has its answer."""

    def missing() -> int:
        return len(ids) - int(client.exists(*[result_key(job_id) for job_id in ids]))

    wait_until(lambda: missing() == 0, timeout_s=timeout_s, every_s=0.2, what=f"answers of {len(ids)} jobs")


def tokens(client: redis.Redis) -> set[bytes]:
    """The workers' lives that hold claims now."""
    records: Any = client.hvals(CLAIMS)
    return {record.split(b"|", 1)[0] for record in records}


def count(client: redis.Redis, ids: Sequence[str]) -> Count:
    """Hold the results stream against what was sent."""
    stream: Any = client.xrange(RESULT_STREAM)
    sent = set(ids)
    answers = [Answer.from_json(fields[b"answer"]) for _, fields in stream if fields[b"id"].decode() in sent]
    entries = Counter(answer.id for answer in answers)
    assert client.hlen(CLAIMS) == client.zcard(LEASES) == 0, "claims are left behind"
    return Count(
        enqueued=len(sent),
        answered=len(sent & entries.keys()),
        twice=sum(entries[job_id] > 1 for job_id in sent),
        lost=len(sent - entries.keys()),
        reaped=int(client.hget(COUNTERS, "reaped") or 0),
        discarded=int(client.hget(COUNTERS, "answers_discarded") or 0),
        statuses=dict(Counter(str(answer.status) for answer in answers)),
        attempts=dict(Counter(answer.attempts for answer in answers)),
    )
