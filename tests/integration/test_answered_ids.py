"""Duplicates of answered jobs: the caller gets the kept answer, or `already_answered`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from shiwu import Client, JobFailed
from shiwu.broker.answers import AnswerEntry
from shiwu.broker.message_writer import build_message
from shiwu.contract import (
    ATTEMPTS,
    CLAIMS,
    COUNTERS,
    HISTORIES,
    RESULT_STREAM,
    Answer,
    ErrorCode,
    Lane,
    Request,
    Status,
    done_key,
    result_key,
)
from shiwu_worker.jobs.job import Release
from shiwu_worker.policy.limits import LeaseOptions
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from tests.compat.shapes import ODD_IDS, protocol_2
from tests.support.celery_client import celery_client
from tests.support.redis_parts import answer, make_answer_store
from tests.support.waiting import wait_until

ID = 'job "7"\n'


@pytest.fixture
def claims(redis_client: redis.Redis) -> LeaseQueue:
    """A worker's claims."""
    return LeaseQueue(redis_client, LeaseOptions(lease_s=60), token="w", worker="worker-7", result_ttl_s=60)


@pytest.fixture
def answered(redis_client: redis.Redis, claims: LeaseQueue) -> Iterator[redis.Redis]:
    """A Redis where a job was sent and answered."""
    redis_client.lpush("shiwu.bulk", protocol_2(ID, "s3://b/k"))
    [job] = claims.claim(1).jobs
    make_answer_store(redis_client, "w").write([answer(job)])
    yield redis_client
    assert redis_client.xlen(RESULT_STREAM) == 1, "a copy makes no second entry in the results stream"


def test_duplicate_gets_the_kept_answer_again(answered: redis.Redis, claims: LeaseQueue) -> None:
    """Clients that send one id several times all get the same answer."""
    before = answered.get(result_key(ID))
    with answered.pubsub(ignore_subscribe_messages=True) as listener:  # type: ignore[no-untyped-call]  # redis' own
        listener.subscribe(result_key(ID))
        wait_until(lambda: listener.get_message(timeout=0.1) or listener.subscribed, timeout_s=5)
        answered.lpush("shiwu.bulk", protocol_2(ID, "s3://b/k"))
        assert claims.claim(1).jobs == ()
        message = wait_until(lambda: listener.get_message(timeout=0.1), timeout_s=5)
    assert message["data"] == before == answered.get(result_key(ID))


def test_duplicate_of_an_expired_answer_ends_the_wait(
    answered: redis.Redis, claims: LeaseQueue, redis_url: str
) -> None:
    """The mark exists and the answer does not: `wait` and Celery's `get` end with `already_answered`."""
    with Client(redis_url) as client, ThreadPoolExecutor(1) as pool, celery_client(redis_url) as app:
        app.AsyncResult(ID).forget()
        assert client.answer(ID) is None
        client.enqueue("s3://b/k", id=ID)
        waiting = pool.submit(client.wait, ID, timeout_s=30)
        wait_until(lambda: answered.pubsub_numsub(result_key(ID))[0][1] == 1, timeout_s=10)
        assert claims.claim(1).jobs == ()
        result = waiting.result(timeout=10)
        with pytest.raises(JobFailed, match="already_answered"):
            app.AsyncResult(ID).get(timeout=10)
    assert result.error is not None
    assert (result.id, result.status, result.worker) == (ID, Status.REJECTED, "worker-7")
    assert result.error.code is ErrorCode.ALREADY_ANSWERED
    assert 0 < answered.ttl(result_key(ID)) <= 60
    assert answered.ttl(done_key(ID)) > 60, "the mark is as it was"
    meta: Any = json.loads(answered.get(result_key(ID)) or b"")
    assert (meta["status"], meta["task_id"]) == ("FAILURE", ID)


def test_release_of_a_held_duplicate_is_no_attempt(answered: redis.Redis, claims: LeaseQueue) -> None:
    """A worker that lost its device may release the id whose copy it still holds for the announcement."""
    answered.hset(CLAIMS, ID, b"w|0|shiwu.bulk|" + protocol_2(ID, "s3://b/k"))
    assert claims.release([Release(ID, counts=True, ending="device_lost|encode")]) == 1
    assert answered.llen("shiwu.bulk") == 1
    assert answered.exists(ATTEMPTS, CLAIMS, HISTORIES) == 0


def test_duplicate_with_ignore_result_gets_none(answered: redis.Redis, claims: LeaseQueue) -> None:
    """No caller looks for it."""
    answered.delete(result_key(ID))
    answered.lpush("shiwu.bulk", protocol_2(ID, "s3://b/k", headers={"ignore_result": True}))
    assert claims.claim(1).jobs == ()
    assert answered.get(result_key(ID)) is None
    assert answered.hget(COUNTERS, "duplicates_dropped") == b"1"


def test_duplicate_of_a_claimed_job_is_dropped(redis_client: redis.Redis, claims: LeaseQueue) -> None:
    """Nothing is announced before there is an answer."""
    message = build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK)
    redis_client.lpush("shiwu.bulk", message, message)
    [job] = claims.claim(1).jobs
    assert claims.claim(1).jobs == ()
    assert redis_client.get(result_key("x")) is None
    make_answer_store(redis_client, "w").write([answer(job)])
    assert json.loads(redis_client.get(result_key("x")) or b"")["status"] == "SUCCESS"


def test_result_key_of_a_wrong_type_is_not_changed(answered: redis.Redis, claims: LeaseQueue) -> None:
    """Another program wrote it; the claim goes on."""
    answered.delete(result_key(ID))
    answered.lpush(result_key(ID), "theirs")
    answered.lpush("shiwu.bulk", protocol_2(ID, "s3://b/k"), protocol_2("next", "s3://b/k"))
    assert [job.id for job in claims.claim(2).jobs] == ["next"]
    assert answered.lrange(result_key(ID), 0, -1) == [b"theirs"]


def test_refused_duplicate_gets_an_answer(answered: redis.Redis) -> None:
    """Only the worker could read the id, so the commit finds the mark; the caller must find the refusal."""
    refused = Answer(id=ID, status=Status.REJECTED)
    answered.delete(result_key(ID))
    entry = AnswerEntry(id=ID, claim="~" + "0a" * 20, answer=refused, message=b"shiwu.bulk|{}", is_dead=True)
    assert make_answer_store(answered, "other").write([entry]) == {ID}
    assert json.loads(answered.get(result_key(ID)) or b"")["status"] == "FAILURE"
    answered.set(result_key(ID), "kept")
    make_answer_store(answered, "another").write([entry])
    assert answered.get(result_key(ID)) == b"kept"


def test_lost_claim_reply_releases_jobs_of_any_id(redis_client: redis.Redis, claims: LeaseQueue) -> None:
    """Jobs of a claim whose reply was lost are released, whatever characters the ids have."""
    redis_client.lpush("shiwu.bulk", *[protocol_2(job_id, "s3://b/k") for job_id in ODD_IDS])
    assert [job.id for job in claims.claim(100).jobs] == list(ODD_IDS)
    claims._may_have_lost_reply = True
    assert [job.id for job in claims.claim(100).jobs] == list(ODD_IDS)
