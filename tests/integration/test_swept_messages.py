"""A sweep takes expired messages out of their lane one by one, and answers only those that it took."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import redis

from shiwu.contract import (
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    PENDING_ANSWERS,
    RESULT_STREAM,
    Answer,
    Lane,
    Status,
)
from shiwu_worker.jobs.job import Release
from tests.compat.shapes import encoded, message
from tests.support.redis_parts import DeadLetters, answer, cancel, make_answer_store, make_lease_queue, make_maintenance

EXPIRED = "2020-01-01T00:00:00+00:00"


def expired(job_id: str, *, mark: str = "", has_callbacks: bool = False) -> bytes:
    """A message whose `expires` has passed; the mark makes two of one id different."""
    embed: dict[str, Any] = {"callbacks": [{"task": "t"}]} if has_callbacks else {}
    headers = {"task": "shiwu.tag", "id": job_id, "expires": EXPIRED, "origin": mark}
    return message(encoded([["s3://b/k.jpg"], {}, embed]), headers=headers)


@pytest.mark.parametrize("generation", [0, 1])
def test_sweep_keeps_callbacks_of_an_answered_id(redis_client: redis.Redis, generation: int) -> None:
    """A job is cancelled in its lane and expires there: its callbacks get the answer `cancelled`."""
    raw = expired("job", has_callbacks=True)
    redis_client.lpush(Lane.BULK.queue, raw)
    if generation:
        [job] = make_lease_queue(redis_client, "w").claim(1).jobs
        failed = Answer(id="job", status=Status.FAILED)
        committer = make_answer_store(redis_client, "w")
        committer.write(
            [msgspec.structs.replace(answer(job), answer=failed, is_dead=True, message=b"shiwu.bulk|" + raw)]
        )
        assert DeadLetters(redis_client).requeue(["job"]) == ["job"]
    cancel(redis_client, "job")
    make_maintenance(redis_client).sweep()
    [(member, record)] = redis_client.hgetall(CANVAS).items()
    assert member == (b"job\xff1" if generation else b"job")
    assert b'"cancelled"' in record
    assert record.endswith(b"shiwu.bulk|" + raw)
    assert redis_client.zrange(CANVAS_DUE, 0, -1) == [member]
    assert redis_client.exists(PENDING_ANSWERS, CLAIMS, Lane.BULK.queue) == 0
    assert redis_client.xlen(RESULT_STREAM) == 1 + generation


def test_sweep_answers_the_older_of_two_copies(redis_client: redis.Redis) -> None:
    """The older one is taken with its callbacks; the other stays, and the next sweep drops it."""
    older, newer = expired("job", mark="1", has_callbacks=True), expired("job", mark="2")
    redis_client.lpush(Lane.BULK.queue, older, newer)
    maintenance = make_maintenance(redis_client)
    assert maintenance.sweep().expired == 1
    assert redis_client.lrange(Lane.BULK.queue, 0, -1) == [newer]
    assert [record[-len(older) :] for record in redis_client.hvals(CANVAS)] == [older]
    assert maintenance.sweep().expired == 0
    assert redis_client.llen(Lane.BULK.queue) == 0
    assert redis_client.xlen(RESULT_STREAM) == 1


def test_sweep_leaves_a_copy_of_a_claimed_job(redis_client: redis.Redis) -> None:
    """The claim stays the worker's, and so does the message in the lane."""
    redis_client.lpush(Lane.BULK.queue, expired("job", mark="1"))
    queue = make_lease_queue(redis_client, "w")
    queue.claim(1)
    redis_client.lpush(Lane.BULK.queue, expired("job", mark="2"))
    assert make_maintenance(redis_client).sweep().expired == 0
    assert redis_client.llen(Lane.BULK.queue) == 1
    assert redis_client.xlen(RESULT_STREAM) == 0
    assert queue.renew(["job"]) == []
    assert queue.release([Release("job")]) == 1


def test_sweep_answers_only_what_it_took(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker claims one of two expired messages after the sweep has read the lane."""
    redis_client.lpush(Lane.BULK.queue, expired("claimed"), expired("waiting"))
    maintenance = make_maintenance(redis_client)
    take_late: Any = maintenance._expiry._take_late

    def after_a_claim(**arguments: Any) -> Any:
        assert [job.id for job in make_lease_queue(redis_client, "w").claim(1).jobs] == ["claimed"]
        return take_late(**arguments)

    monkeypatch.setattr(maintenance._expiry, "_take_late", after_a_claim)
    assert maintenance.sweep().expired == 1
    assert [fields[b"id"] for _, fields in redis_client.xrange(RESULT_STREAM)] == [b"waiting"]
    assert redis_client.hkeys(CLAIMS) == [b"claimed"]
