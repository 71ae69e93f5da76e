"""The claim scripts against a real server: order, shares, leases, attempts, odd messages."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis

from shiwu.contract import ATTEMPTS, CLAIMS, DELAYED, LEASES, Lane, done_key
from shiwu_worker.jobs.job import Release
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the real server."""
    with redis.Redis.from_url(redis_url) as connected:
        yield connected


def test_claim_is_recorded_under_a_lease(client: redis.Redis) -> None:
    """A popped message is recorded in the claims in the same step, with a lease of the given length."""
    client.lpush("shiwu.interactive", message("one"))
    [job] = make_lease_queue(client, "w", lease_s=15).claim(10).jobs
    assert (job.id, job.attempt, job.key, job.raw) == ("one", 1, Lane.INTERACTIVE.queue, message_of(client, "one"))
    assert client.zscore(LEASES, "one") == pytest.approx(job.claimed_ms + 15_000, abs=2)
    assert client.llen("shiwu.interactive") == 0


def message_of(client: redis.Redis, job_id: str) -> bytes:
    """The raw message as the claims keep it."""
    record = client.hget(CLAIMS, job_id)
    assert record is not None
    return record.split(b"|", 3)[3]


def test_interactive_and_urgent_jobs_are_claimed_first(client: redis.Redis) -> None:
    """Order of a claim: interactive by priority step, then bulk by priority step, each first in first out."""
    keys = [*Lane.INTERACTIVE.keys, *Lane.BULK.keys]
    for number, key in reversed(list(enumerate(keys))):
        client.lpush(key, message(f"{number}-a"), message(f"{number}-b"))
    jobs = make_lease_queue(client, "w", bulk_share=0.0).claim(100).jobs
    assert [job.id for job in jobs] == [f"{number}-{x}" for number in range(8) for x in "ab"]


def test_bulk_keeps_its_share_while_interactive_waits(client: redis.Redis) -> None:
    """With a share of 0.1 a tenth of many small claims is bulk, although interactive never runs dry."""
    client.lpush("shiwu.interactive", *[message(f"i{n}") for n in range(400)])
    client.lpush("shiwu.bulk", *[message(f"b{n}", Lane.BULK) for n in range(400)])
    claims = make_lease_queue(client, "w", bulk_share=0.1)
    jobs = [job for _ in range(100) for job in claims.claim(3).jobs]
    assert sum(job.key in Lane.BULK.keys for job in jobs) in range(27, 34)


def test_claim_takes_a_limited_part_of_large_messages(client: redis.Redis) -> None:
    """A worker reads the messages of a claim one by one, so interactive jobs would wait for 500 large ones."""
    large = [f"large-{number}" for number in range(40)]
    padding = b',"padding":"%s"}' % (b"x" * 200_000)
    client.lpush("shiwu.bulk", *[message(job_id, Lane.BULK)[:-1] + padding for job_id in large])
    client.lpush("shiwu.interactive", *[message(f"small-{number}") for number in range(300)])
    claims = make_lease_queue(client, "w", bulk_share=0.5)
    jobs = [job.id for job in claims.claim(1000).jobs]
    assert sum(job_id.startswith("large") for job_id in jobs) == 4
    assert sum(job_id.startswith("small") for job_id in jobs) == 300
    jobs += [job.id for _ in range(40) for job in claims.claim(1000).jobs]
    assert [job_id for job_id in jobs if job_id.startswith("large")] == large


def test_job_of_a_crashed_worker_returns_to_the_front(client: redis.Redis) -> None:
    """Any worker reaps an ended lease; the job is next in its lane and its attempt is 2."""
    client.lpush("shiwu.bulk", message("old", Lane.BULK), message("new", Lane.BULK))
    make_lease_queue(client, "dead", lease_s=0.05).claim(1)
    other = make_lease_queue(client, "other")
    wait_until(lambda: make_maintenance(client).run_once().reaped == 1, timeout_s=5)
    assert [(job.id, job.attempt) for job in other.claim(2).jobs] == [("old", 2), ("new", 1)]


def test_lease_of_a_running_worker_is_renewed(client: redis.Redis) -> None:
    """A renewed lease does not expire; the reply names jobs that this worker no longer holds."""
    client.lpush("shiwu.bulk", message("mine"), message("lost"))
    mine, other = make_lease_queue(client, "mine", lease_s=30), make_lease_queue(client, "other")
    mine.claim(2)
    before = client.zscore(LEASES, "mine")
    make_answer_store(client, "other").write([])
    client.hset(CLAIMS, "lost", b"other|1|shiwu.bulk|raw")
    assert mine.renew(["mine", "lost", "never"]) == ["lost", "never"]
    assert client.zscore(LEASES, "mine") >= before
    assert other.release([Release("mine")]) == 0, "only the owner may give a job back"


def test_duplicates_of_an_id_are_dropped_at_claim(client: redis.Redis) -> None:
    """Two copies in one claim, a copy of a claimed job and a copy of an answered one: one job in all."""
    client.lpush("shiwu.bulk", message("same"), message("same"))
    claims = make_lease_queue(client, "w")
    [job] = claims.claim(10).jobs
    client.lpush("shiwu.interactive", message("same"))
    assert claims.claim(10).jobs == ()
    make_answer_store(client, "w").write([answer(job)])
    client.lpush("shiwu.interactive", message("same"))
    assert claims.claim(10).jobs == ()
    assert client.hget("shiwu:counters", "duplicates_dropped") == b"3"


def test_mark_outlives_a_deleted_answer(client: redis.Redis) -> None:
    """A consumer that deletes the answer does not open the id for a second one."""
    client.lpush("shiwu.bulk", message("x"))
    claims = make_lease_queue(client, "w")
    committer = make_answer_store(client, "w")
    [job] = claims.claim(1).jobs
    committer.write([answer(job)])
    client.delete("celery-task-meta-x")
    assert make_answer_store(client, "other").write([answer(job)]) == {"x"}
    assert client.exists("celery-task-meta-x") == 0
    assert client.ttl(done_key("x")) > 60


def test_repeated_commit_recognises_its_own_answer(client: redis.Redis) -> None:
    """The same commit twice (its first reply was lost) is no duplicate, and appends to the stream once."""
    client.lpush("shiwu.bulk", message("x"))
    [job] = make_lease_queue(client, "w").claim(1).jobs
    committer = make_answer_store(client, "w")
    assert committer.write([answer(job)]) == set()
    assert committer.write([answer(job)]) == set()
    assert client.xlen("shiwu:results") == 1


def test_delayed_job_returns_after_its_delay(client: redis.Redis) -> None:
    """A delayed job is not in the lane, and comes back with its bytes and its attempts."""
    client.lpush("shiwu.bulk", message("later", Lane.BULK))
    claims = make_lease_queue(client, "w")
    [job] = claims.claim(1).jobs
    assert claims.release([Release("later", delay_s=0.2, counts=True)]) == 1
    assert claims.claim(1).jobs == ()
    assert make_maintenance(client).run_once().promoted == 0
    wait_until(lambda: make_maintenance(client).run_once().promoted == 1, timeout_s=5)
    [again] = claims.claim(1).jobs
    assert (again.raw, again.attempt) == (job.raw, 2)
    assert client.zcard(DELAYED) == 0


def test_release_that_does_not_count_keeps_the_attempt(client: redis.Redis) -> None:
    """Jobs given back by a shutdown have not been tried."""
    client.lpush("shiwu.bulk", message("x"))
    claims = make_lease_queue(client, "w")
    claims.claim(1)
    claims.release([Release("x")])
    assert [job.attempt for job in claims.claim(1).jobs] == [1]
    assert client.hlen(ATTEMPTS) == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"headers":{}}',
        b'{"headers":{"id":null}}',
        b'{"headers":{"id":true}}',
        b'{"headers":{"id":["a"]}}',
        b'{"headers":[],"properties":[]}',
        b'{"headers":{"id":"a\xff"}}',
        b'{"headers":{"id":"\xe2\xc3\xa9\x82\xac"}}',
        b'{"headers":{"id":"\xed\xa0\x80"}}',
        b"\xff\xfe\x00|pipes|and\nlines",
        b"[" * 2000,
    ],
)
def test_message_without_an_id_is_claimed_by_its_digest(client: redis.Redis, raw: bytes) -> None:
    """Whatever lies in a lane is claimed, comes back unchanged, and can be answered."""
    client.lpush("shiwu.bulk", raw)
    claims = make_lease_queue(client, "w")
    [job] = claims.claim(1).jobs
    assert job.id.startswith("~")
    claims.release([Release(job.id)])
    [again] = claims.claim(1).jobs
    assert (again.id, again.raw) == (job.id, raw)


def test_lane_key_of_a_wrong_type_delays_no_other_lane(client: redis.Redis) -> None:
    """A string where a list should be is passed over; the other keys are served."""
    client.set("shiwu.interactive", "oops")
    client.lpush("shiwu.bulk", message("x"))
    assert [job.id for job in make_lease_queue(client, "w").claim(5).jobs] == ["x"]


def test_keys_of_a_wrong_type_stop_the_claim_before_it_pops(client: redis.Redis) -> None:
    """A script is not undone by Redis, so it must fail before it takes a message."""
    client.set(CLAIMS, "oops")
    client.lpush("shiwu.bulk", message("x"))
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        make_lease_queue(client, "w").claim(5)
    assert client.llen("shiwu.bulk") == 1


def test_scripts_survive_a_flushed_script_cache(client: redis.Redis) -> None:
    """SCRIPT FLUSH (or a fresh replica) costs one more round trip and nothing else."""
    claims = make_lease_queue(client, "w")
    claims.claim(1)
    client.script_flush()
    client.lpush("shiwu.bulk", message("x"))
    assert [job.id for job in claims.claim(1).jobs] == ["x"]


def test_result_is_the_json_of_celery(client: redis.Redis) -> None:
    """The stored value is what Celery's Redis backend writes."""
    client.lpush("shiwu.bulk", message("x"))
    [job] = make_lease_queue(client, "w").claim(1).jobs
    make_answer_store(client, "w").write([answer(job)])
    meta = json.loads(client.get("celery-task-meta-x") or b"")
    assert meta["status"] == "SUCCESS"
    assert meta["result"]["status"] == "tagged"
    assert meta["task_id"] == "x"
    assert set(meta) == {"status", "result", "traceback", "children", "date_done", "task_id"}


@pytest.mark.parametrize(("bulk_limit", "bulk"), [(0, 0), (2, 2), (4, 4), (50, 7)])
def test_claim_takes_no_more_bulk_than_there_is_room_for(client: redis.Redis, bulk_limit: int, bulk: int) -> None:
    """Interactive gets the rest of the room, however many bulk jobs wait."""
    client.lpush("shiwu.interactive", *[message(f"i{n}") for n in range(3)])
    client.lpush("shiwu.bulk", *[message(f"b{n}", Lane.BULK) for n in range(50)])
    jobs = make_lease_queue(client, "w", bulk_share=0.5).claim(10, bulk_limit=bulk_limit).jobs
    lanes = [job.key for job in jobs]
    assert (lanes.count("shiwu.interactive"), lanes.count("shiwu.bulk")) == (3, bulk)
    assert client.llen("shiwu.bulk") == 50 - bulk
