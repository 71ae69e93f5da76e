"""Claims that the server runs after the worker has given them up, and claims while a worker stops."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import redis

from shiwu.contract import ATTEMPTS, CLAIMS, LEASES, Lane
from shiwu_worker.service.bootstrap import release_left
from tests.support.pipelines import PipelineUnderTest
from tests.support.redis_parts import make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until

WAIT_S = 10.0


def test_claim_that_was_given_up_brings_nothing_later(redis_client: redis.Redis) -> None:
    """The connection broke, the next claim released what was lost, and only then the server runs the first one."""
    queue = make_lease_queue(redis_client, "w")
    script, late = queue._claim, dict[str, Any]()

    def lose(**call: Any) -> Any:
        late.update(call)
        raise redis.TimeoutError("given up")

    queue._claim = lose  # type: ignore[assignment]  # takes what the queue passes
    with pytest.raises(redis.TimeoutError):
        queue.claim(5)
    queue._claim = script
    assert queue.claim(5).jobs == ()
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    assert script(**late)[3:] == []
    assert redis_client.llen(Lane.BULK.queue) == 1
    assert [job.id for job in queue.claim(5).jobs] == ["job"]


def test_no_claim_begins_after_the_end(redis_client: redis.Redis) -> None:
    """The last claim is released without a count, and neither a new nor a late claim brings anything."""
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    queue = make_lease_queue(redis_client, "w")
    script, calls = queue._claim, list[dict[str, Any]]()

    def record(**call: Any) -> Any:
        calls.append(call)
        return script(**call)

    queue._claim = record  # type: ignore[assignment]  # takes what the queue passes
    assert len(queue.claim(5).jobs) == 1
    assert queue.end() == 1
    assert queue.claim(5).jobs == ()
    assert len(calls) == 1
    assert script(**calls[0])[3:] == []
    assert (redis_client.llen(Lane.BULK.queue), redis_client.exists(CLAIMS, LEASES, ATTEMPTS)) == (1, 0)


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "slow"])
def test_claim_during_a_stop_is_released(redis_client: redis.Redis, is_lost: bool) -> None:
    """The server has run it, and its reply comes after SIGTERM or never: the jobs return, and nothing crashed."""
    parts = PipelineUnderTest(redis_client)
    script, executed, may_reply = parts.lease_queue._claim, threading.Event(), threading.Event()

    def slow(**call: Any) -> Any:
        reply = script(**call)
        if len(reply) > 2:
            executed.set()
            assert may_reply.wait(WAIT_S)
            if is_lost:
                raise redis.TimeoutError("no reply")
        return reply

    parts.lease_queue._claim = slow  # type: ignore[assignment]  # takes what the queue passes
    redis_client.lpush(Lane.BULK.queue, *[message(f"job-{n}", Lane.BULK) for n in range(6)])
    parts.start()
    assert executed.wait(WAIT_S)
    stopping = threading.Thread(target=parts.stop)
    stopping.start()
    wait_until(parts.pipeline._ended.is_set, timeout_s=WAIT_S)
    may_reply.set()
    stopping.join(WAIT_S)
    parts.pipeline.threads[0].join(WAIT_S)
    assert redis_client.exists(CLAIMS, LEASES) == 0
    assert make_maintenance(redis_client).run_once().reaped == 0
    assert redis_client.exists(ATTEMPTS) == 0
    jobs = make_lease_queue(redis_client, "next").claim(10).jobs
    assert [(job.id, job.attempt) for job in jobs] == [(f"job-{n}", 1) for n in range(6)]


def test_what_a_hung_claim_brought_is_released_at_the_end(redis_client: redis.Redis) -> None:
    """The claim thread still waits for its reply when the worker exits."""
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    queue = make_lease_queue(redis_client, "w")
    queue.claim(5)
    release_left(queue, [])
    assert (redis_client.llen(Lane.BULK.queue), redis_client.exists(CLAIMS, ATTEMPTS)) == (1, 0)
