"""What all workers share of the queues: counted by one of them, as Redis has it."""

from __future__ import annotations

import time

import pytest
import redis

from shiwu.broker.message_writer import build_message
from shiwu.broker.queue_stats import shared_snapshot
from shiwu.contract import QUEUE_SNAPSHOT, Lane, Request
from shiwu_worker.telemetry.queue_monitor import QueueMonitor
from tests.support.snapshots import make_snapshot
from tests.support.waiting import wait_until


def send(client: redis.Redis, lane: Lane, *ids: str, key: str | None = None, age_s: float = 0.0) -> None:
    """Put jobs into a lane that were sent so long ago."""
    for job_id in ids:
        message = build_message(
            Request(image="s3://b/k"), job_id=job_id, lane=lane, sent_ms=(time.time() - age_s) * 1000
        )
        client.lpush(key or lane.queue, message)


def test_snapshot_has_counts_and_age_of_the_oldest(redis_client: redis.Redis) -> None:
    """In all lanes and priorities; an unreadable message has no age."""
    send(redis_client, Lane.BULK, "a", age_s=60)
    send(redis_client, Lane.BULK, "b")
    send(redis_client, Lane.BULK, "c", key=Lane.BULK.keys[1])
    redis_client.rpush(Lane.INTERACTIVE.queue, b"no message")
    snapshot = shared_snapshot(redis_client, max_age_s=5)
    assert snapshot.waiting == {Lane.INTERACTIVE: 1, Lane.BULK: 3}
    assert snapshot.claimed == dict.fromkeys(Lane, 0)
    assert list(snapshot.oldest_ms) == [Lane.BULK]
    assert 60_000 <= snapshot.at_ms - snapshot.oldest_ms[Lane.BULK] < 120_000


def test_snapshot_is_shared_until_it_is_too_old(redis_client: redis.Redis) -> None:
    """A second worker gets the snapshot of the first; an unreadable snapshot is replaced."""
    first = shared_snapshot(redis_client, max_age_s=5)
    send(redis_client, Lane.BULK, "a")
    assert shared_snapshot(redis_client, max_age_s=5) == first
    assert 0 < redis_client.pttl(QUEUE_SNAPSHOT) <= 5000
    assert shared_snapshot(redis_client, max_age_s=0.0).waiting[Lane.BULK] == 1
    redis_client.set(QUEUE_SNAPSHOT, b'{"at_ms": "soon"}')
    assert shared_snapshot(redis_client, max_age_s=5).waiting[Lane.BULK] == 1


def test_queue_monitor_goes_on_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Redis and defects of the GPU's duty come and go; lanes are counted meanwhile and afterwards."""
    monkeypatch.setattr("shiwu_worker.telemetry.queue_monitor.SNAPSHOT_EVERY_S", 0.02)
    errors: list[Exception] = [redis.ConnectionError("away"), ValueError("a defect"), ValueError("again")]
    counts: list[int] = []

    def once_more() -> None:
        if errors:
            raise errors.pop(0)

    watch = QueueMonitor(
        lambda: make_snapshot(waiting=3),
        on_snapshot=lambda snapshot, _: counts.append(snapshot.waiting[Lane.BULK]),
        before_each=once_more,
    )
    watch.start()
    wait_until(lambda: len(counts) >= 3, timeout_s=10, what="counts beside two defects of the other duty, and after")
    watch.close()
    assert (set(counts), errors) == ({3}, [])
