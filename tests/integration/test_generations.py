"""Generations: a requeue of a dead letter starts one, and an answer counts only for the generation it was made for."""

from __future__ import annotations

import json

import msgspec
import pytest
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import (
    ATTEMPTS,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DEADLINES,
    LEASES,
    RESULT_STREAM,
    Answer,
    Lane,
    Status,
    done_key,
    result_key,
)
from shiwu_worker.jobs.job import Claimed, Release
from tests.compat.shapes import protocol_2
from tests.support.redis_parts import (
    DeadLetters,
    answer,
    forget_mark,
    make_answer_store,
    make_lease_queue,
    make_maintenance,
    message,
)
from tests.support.waiting import wait_until


def failure(job: Claimed, *, has_callbacks: bool = False) -> AnswerEntry:
    """The answer of a job that becomes a dead letter."""
    failed = Answer(id=job.id, status=Status.FAILED, attempts=job.attempt)
    raw = job.key.encode() + b"|" + job.raw
    return msgspec.structs.replace(answer(job), answer=failed, message=raw, is_dead=True, has_callbacks=has_callbacks)


def claim_one(client: redis.Redis, worker: str = "w") -> Claimed:
    """The next job of the bulk lane."""
    [job] = make_lease_queue(client, worker).claim(1).jobs
    return job


def requeued(client: redis.Redis, *, has_callbacks: bool = False) -> Claimed:
    """Send a job, let it fail and requeue it; returns the claim of its first generation."""
    client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    job = claim_one(client, "first")
    make_answer_store(client, "first").write([failure(job, has_callbacks=has_callbacks)])
    assert DeadLetters(client).requeue(["job"]) == ["job"]
    return job


def test_each_requeue_starts_a_generation(redis_client: redis.Redis) -> None:
    """The claim tells the worker the number, and retries and worker deaths keep it."""
    assert requeued(redis_client).generation == 0
    queue = make_lease_queue(redis_client, "w", lease_s=0.0)
    [job] = queue.claim(1).jobs
    assert (job.generation, job.attempt, job.deaths) == (1, 1, 0)
    make_maintenance(redis_client).run_once()
    [job] = queue.claim(1).jobs
    assert (job.generation, job.attempt, job.deaths) == (1, 2, 1)
    queue.release([Release("job", delay_s=0.001, counts=True)])
    wait_until(lambda: make_maintenance(redis_client).run_once().promoted, timeout_s=5)
    [job] = queue.claim(1).jobs
    assert (job.generation, job.attempt, job.deaths) == (1, 3, 1)
    make_answer_store(redis_client, "w").write([failure(job)])
    assert [fields.get(b"generation") for _, fields in redis_client.xrange(RESULT_STREAM)] == [None, b"1"]
    assert redis_client.hlen(ATTEMPTS) == 0
    assert DeadLetters(redis_client).requeue(["job"]) == ["job"]
    assert claim_one(redis_client).generation == 2


@pytest.mark.parametrize("where", ["lane", "claimed", "delayed"])
def test_late_answer_of_an_earlier_generation_is_discarded(redis_client: redis.Redis, where: str) -> None:
    """It is counted, and the requeued job stays where it is, with its attempts."""
    first = requeued(redis_client)
    queue = make_lease_queue(redis_client, "w", lease_s=0.0)
    queue.claim(1)
    make_maintenance(redis_client).run_once()
    redis_client.zadd(DEADLINES, {"job": 9e15})
    if where != "lane":
        assert queue.claim(1).jobs[0].attempt == 2
    if where == "delayed":
        queue.release([Release("job", delay_s=300)])
    before = redis_client.hgetall(CLAIMS), redis_client.zcard(LEASES), redis_client.hgetall(ATTEMPTS)
    assert make_answer_store(redis_client, "late").write([answer(first)]) == {"job"}
    assert (redis_client.hgetall(CLAIMS), redis_client.zcard(LEASES), redis_client.hgetall(ATTEMPTS)) == before
    assert redis_client.exists(done_key("job"), result_key("job")) == 0
    assert redis_client.zcard(DEADLINES) == 1
    assert redis_client.hget(COUNTERS, "answers_discarded") == b"1"
    if where == "lane":
        claimed = queue.claim(1).jobs[0]
        assert (claimed.attempt, claimed.deaths) == (2, 1)
        assert make_answer_store(redis_client, "w").write([answer(claimed)]) == set()


def test_discarded_answer_leaves_others_of_its_commit(redis_client: redis.Redis) -> None:
    """The other answers of the batch are stored and their claims removed."""
    first = requeued(redis_client)
    redis_client.lpush(Lane.BULK.queue, message("other", Lane.BULK))
    queue = make_lease_queue(redis_client, "w")
    jobs = {job.id: job for job in queue.claim(2).jobs}
    committer = make_answer_store(redis_client, "w")
    assert committer.write([answer(first), answer(jobs["other"])]) == {"job"}
    assert redis_client.hkeys(CLAIMS) == [b"job"]
    assert committer.write([answer(jobs["job"])]) == set()
    assert redis_client.exists(CLAIMS, LEASES, ATTEMPTS) == 0


def test_repeated_commit_of_a_generation_is_recognised(redis_client: redis.Redis) -> None:
    """After a lost reply the same commit is no second answer, while one of an earlier generation is."""
    first = requeued(redis_client)
    second = claim_one(redis_client, "first")
    committer = make_answer_store(redis_client, "first")
    assert committer.write([answer(second)]) == set()
    assert committer.write([answer(second)]) == set()
    assert committer.write([failure(first)]) == {"job"}
    assert redis_client.xlen(RESULT_STREAM) == 2


def test_cancel_means_the_current_generation(redis_client: redis.Redis) -> None:
    """A client that does not know the generation cancels a requeued job, and a repeated cancel is recognised."""
    requeued(redis_client)
    committer = make_answer_store(redis_client, "client")
    cancelled = AnswerEntry(id="job", answer=Answer(id="job", status=Status.CANCELLED), is_from_outside=True)
    assert committer.write([cancelled]) == set()
    assert committer.write([cancelled]) == set()
    assert make_lease_queue(redis_client, "w").claim(5).jobs == ()
    assert redis_client.exists(ATTEMPTS) == 0


def test_claim_without_a_readable_id_has_no_generation(redis_client: redis.Redis) -> None:
    """A message that is claimed under its digest is answered after a requeue, too."""
    job_id = "found by the worker"
    entry = AnswerEntry(
        id=job_id,
        claim="~" + "0a" * 20,
        answer=Answer(id=job_id, status=Status.REJECTED),
        message=b"shiwu.bulk|" + protocol_2("x", "s3://b/k"),
        is_dead=True,
    )
    committer = make_answer_store(redis_client, "w")
    for number in range(3):
        assert committer.write([entry]) == set(), number
        assert DeadLetters(redis_client).requeue([job_id]) == [job_id]
    assert redis_client.hgetall(ATTEMPTS) == {job_id.encode(): b"0/3:0"}
    assert committer.write([entry]) == set()
    assert committer.write([entry]) == set()
    assert redis_client.exists(ATTEMPTS) == 0


def test_answer_of_a_new_message_removes_the_dead_letter(redis_client: redis.Redis) -> None:
    """A dead letter outlives the mark; the id is sent again and tagged, and a requeue cannot delete that answer."""
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK), message("kept", Lane.BULK))
    queue, committer = make_lease_queue(redis_client, "w"), make_answer_store(redis_client, "w")
    committer.write([failure(job) for job in queue.claim(2).jobs])
    forget_mark(redis_client, "job")
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    again = claim_one(redis_client)
    assert DeadLetters(redis_client).requeue(["job"]) == [], "its new message is claimed"
    committer.write([answer(again)])
    assert DeadLetters(redis_client).requeue(["job"]) == []
    assert json.loads(redis_client.get(result_key("job")) or b"")["status"] == "SUCCESS"
    for key in (DEAD, DEAD_ANSWERS, DEAD_MESSAGES):
        names = redis_client.zrange(key, 0, -1) if key == DEAD else redis_client.hkeys(key)
        assert names == [b"kept"]


def test_callbacks_of_two_generations_are_kept_apart(redis_client: redis.Redis) -> None:
    """Errbacks that were not sent before the requeue are not replaced by the callbacks of the new answer."""
    requeued(redis_client, has_callbacks=True)
    second = claim_one(redis_client)
    entry = msgspec.structs.replace(answer(second), message=b"shiwu.bulk|" + second.raw, has_callbacks=True)
    AnswerStore(redis_client, token="w").write([entry])
    assert set(redis_client.hkeys(CANVAS)) == {b"job", b"job\xff1"} == set(redis_client.zrange(CANVAS_DUE, 0, -1))
    statuses = [
        json.loads(record.partition(b"|")[2].partition(b"shiwu.bulk|")[0])["status"]
        for record in redis_client.hmget(CANVAS, [b"job", b"job\xff1"])
        if record
    ]
    assert statuses == ["failed", "tagged"]


def test_records_of_the_previous_version_are_read(redis_client: redis.Redis) -> None:
    """Marks, attempts and claims without a generation are of generation 0."""
    redis_client.lpush(Lane.BULK.queue, message("tried", Lane.BULK), message("held", Lane.BULK))
    redis_client.hset(ATTEMPTS, "tried", "2:1")
    redis_client.set(done_key("old"), "worker.ab12:3")
    redis_client.zadd(DEAD, {"old": 1.0})
    redis_client.hset(DEAD_MESSAGES, "old", b"shiwu.bulk|" + message("old", Lane.BULK))
    redis_client.hset(CLAIMS, "reaped", b"gone.cd34|1|shiwu.bulk|" + message("reaped", Lane.BULK))
    redis_client.zadd(LEASES, {"reaped": 1.0})
    assert DeadLetters(redis_client).requeue(["old"]) == ["old"]
    make_maintenance(redis_client).run_once()
    jobs = {
        job.id: (job.generation, job.attempt, job.deaths) for job in make_lease_queue(redis_client, "w").claim(9).jobs
    }
    assert jobs == {"tried": (0, 3, 1), "held": (0, 1, 0), "old": (1, 1, 0), "reaped": (0, 2, 1)}
