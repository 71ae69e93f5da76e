"""Deadlines travel with messages: an entry that another producer wrote for an id answers nothing."""

from __future__ import annotations

from datetime import UTC

import pytest
import redis

from shiwu import Client, Status
from shiwu.broker.deadline_scan import DeadlineScan
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.message_reader import read_message
from shiwu.contract import (
    ANSWER_BY_HEADER,
    DEADLINES,
    QUARANTINE,
    RESULT_STREAM,
    SCAN_OWNER,
    SCAN_WANTED,
    Lane,
    done_key,
)
from shiwu_worker.jobs.job import Release
from tests.support.celery_client import celery_client
from tests.support.redis_parts import make_lease_queue, make_maintenance, message

BULK = Lane.BULK.queue
LATER_MS = 4e12


def run_to_end(maintenance: Maintenance, client: redis.Redis) -> int:
    """Run rounds until no scan is wanted; return how many jobs were answered."""
    answered = maintenance.run_once().out_of_time
    for _ in range(200):
        if not client.exists(SCAN_WANTED):
            return answered
        answered += maintenance.run_once().out_of_time
    raise AssertionError("expected the scan to end")


def test_forged_entry_answers_no_job(redis_client: redis.Redis) -> None:
    """Wherever the message of the victim is, and before it is sent."""
    maintenance = make_maintenance(redis_client)
    redis_client.zadd(DEADLINES, {"early": 0.0})
    assert run_to_end(maintenance, redis_client) == 0
    names = ["claimed", "delayed", "waiting", "early"]
    redis_client.lpush(BULK, *map(message, names))
    queue = make_lease_queue(redis_client, "w")
    queue.claim(2)
    queue.release([Release("delayed", delay_s=60)])
    redis_client.lpush(QUARANTINE, b"shiwu.bulk|" + message("quarantined"))
    redis_client.zadd(DEADLINES, dict.fromkeys([*names, "quarantined"], 0.0))
    assert run_to_end(maintenance, redis_client) == 0
    assert redis_client.zcard(DEADLINES) == redis_client.xlen(RESULT_STREAM) == 0
    assert not any(redis_client.exists(done_key(name)) for name in names)


def test_forged_entries_push_no_answer_out(redis_client: redis.Redis) -> None:
    """5,000 entries of jobs that never existed leave the stream as it is."""
    maintenance = make_maintenance(redis_client, stream_length=100)
    redis_client.zadd(DEADLINES, {f"order-{number}": 0.0 for number in range(5000)})
    for _ in range(11):
        maintenance.run_once()
    assert run_to_end(maintenance, redis_client) == 0
    assert redis_client.zcard(DEADLINES) == redis_client.xlen(RESULT_STREAM) == 0


def test_forged_entry_is_corrected_by_the_message(redis_client: redis.Redis) -> None:
    """A message with a later deadline keeps it, and is answered then."""
    redis_client.lpush(BULK, message("job", answer_by_ms=LATER_MS))
    make_lease_queue(redis_client, "w").claim(1)
    redis_client.zadd(DEADLINES, {"job": 0.0})
    assert make_maintenance(redis_client).run_once().out_of_time == 0
    assert redis_client.zscore(DEADLINES, "job") == LATER_MS


def test_deadline_without_an_entry_counts_from_its_claim(redis_client: redis.Redis) -> None:
    """As of a producer that may not write the index: the claim notes it, also for a job that is delayed afterwards."""
    redis_client.lpush(BULK, message("job", answer_by_ms=1.0), message("odd", answer_by_ms=float("1e300")))
    queue = make_lease_queue(redis_client, "w")
    assert len(queue.claim(2).jobs) == 2
    assert redis_client.zrange(DEADLINES, 0, -1) == [b"job"]
    queue.release([Release("job", delay_s=60)])
    assert make_maintenance(redis_client).run_once().out_of_time == 1
    assert redis_client.exists(done_key("job"))
    assert not redis_client.exists(done_key("odd"))


def test_celery_client_sets_a_deadline_by_header(redis_client: redis.Redis, redis_url: str) -> None:
    """`send_task(headers=…)` is enough."""
    with celery_client(redis_url, has_results=False) as app:
        app.send_task(
            "shiwu.tag", kwargs={"image": "s3://b/k"}, queue=BULK, task_id="job", headers={ANSWER_BY_HEADER: 5.0}
        )
    raw = redis_client.lindex(BULK, -1)
    assert isinstance(raw, bytes)
    envelope = read_message(raw)
    assert (envelope.answer_by_ms, envelope.expires_ms) == (5.0, 5.0)


def test_waiting_jobs_are_answered_by_a_scan(redis_client: redis.Redis) -> None:
    """Deep in a lane and in quarantine, in bounded steps, each once; messages without a result asked for get none."""
    redis_client.lpush(BULK, *[message(f"j{n}", answer_by_ms=1.0 if n % 100 == 0 else None) for n in range(2500)])
    redis_client.rpush(QUARANTINE, b"shiwu.bulk|" + message("quarantined", answer_by_ms=1.0))
    redis_client.zadd(DEADLINES, {"j2400": 1.0, "quarantined": 1.0})
    maintenance = make_maintenance(redis_client)
    first = maintenance.run_once().out_of_time
    assert 0 < first < 26, "expected a bounded step"
    assert first + run_to_end(maintenance, redis_client) == 26
    redis_client.zadd(DEADLINES, {"j0": 1.0})
    assert run_to_end(maintenance, redis_client) == 0
    assert redis_client.xlen(RESULT_STREAM) == 26
    assert redis_client.hget("shiwu:counters", "answers_discarded") is None


def test_scan_keeps_its_place_while_messages_move(redis_client: redis.Redis) -> None:
    """Claims take from the head and retries come back there; no message is passed over."""
    redis_client.lpush(BULK, *[message(f"j{n}", answer_by_ms=1.0) for n in range(3000)])
    scan = DeadlineScan(redis_client)
    found: set[str] = set()
    claimed: set[str] = set()
    queue = make_lease_queue(redis_client, "w")
    while not scan.finished_ms:
        found |= {envelope.id for envelope in scan.step(now_ms=5.0, limit=300, zone=UTC)}
        claimed |= {job.id for job in queue.claim(130, held=claimed).jobs}
        redis_client.rpush(BULK, message("back"))
    assert found | claimed == {"back", *(f"j{n}" for n in range(3000))}
    assert len(found) > 2000


def test_one_process_scans_at_a_time(redis_client: redis.Redis) -> None:
    """Another one takes over when the owner is silent."""
    redis_client.lpush(BULK, *[message(f"j{n}") for n in range(1500)])
    redis_client.zadd(DEADLINES, {"gone": 1.0})
    make_maintenance(redis_client, "a").run_once()
    other = make_maintenance(redis_client, "b")
    other.run_once()
    assert redis_client.get(SCAN_OWNER) == b"a"
    redis_client.delete(SCAN_OWNER)
    run_to_end(other, redis_client)
    assert redis_client.get(SCAN_OWNER) == b"b"


def test_enqueue_needs_no_right_to_the_index(redis_url: str, redis_client: redis.Redis) -> None:
    """A key of a wrong type there refuses no job."""
    redis_client.lpush(DEADLINES, "x")
    with Client(redis_url) as client:
        client.enqueue("s3://b/k.jpg", id="job", answer_by_s=60)
    [job] = make_lease_queue(redis_client, "w").claim(1).jobs
    envelope = read_message(job.raw)
    assert envelope.answer_by_ms is not None
    assert envelope.expires_ms == pytest.approx(envelope.answer_by_ms, abs=1)


def test_sweep_answers_all_expired_at_once(redis_url: str, redis_client: redis.Redis) -> None:
    """One sweep is enough for many portions, and reaches the quarantine."""
    redis_client.lpush(BULK, *[message(f"j{n}", answer_by_ms=1.0) for n in range(3000)])
    redis_client.rpush(QUARANTINE, *[b"shiwu.bulk|" + message(f"q{n}", answer_by_ms=1.0) for n in range(1200)])
    with Client(redis_url) as client:
        assert client.sweep().expired == 4200
        assert client.wait("q7", timeout_s=1).status is Status.EXPIRED
        assert client.sweep().expired == 0
    assert redis_client.llen(BULK) == 0
    assert make_lease_queue(redis_client, "w").claim(5).jobs == ()
