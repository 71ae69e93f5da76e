"""The pipeline over a real Redis, with loaders and a model that the test controls."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis

from shiwu.broker.message_writer import build_message
from shiwu.broker.redis_errors import NotReplicated
from shiwu.contract import (
    ATTEMPTS,
    CLAIMS,
    DELAYED,
    RESULT_STREAM,
    Answer,
    ErrorCode,
    Lane,
    Request,
    Stage,
    Status,
)
from shiwu_worker.config import views
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy
from tests.support.pipelines import LABELS, SLOTS, PipelineUnderTest
from tests.support.redis_parts import make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until


@pytest.fixture
def parts(redis_client: redis.Redis) -> Iterator[PipelineUnderTest]:
    """A pipeline that is not started yet, and is stopped after the test."""
    made = PipelineUnderTest(redis_client)
    yield made
    made.stop()


def enqueue(client: redis.Redis, *ids: str) -> None:
    """Put jobs into the bulk lane."""
    client.lpush(Lane.BULK.queue, *[message(job_id) for job_id in ids])


def answers(client: redis.Redis) -> dict[str, Answer]:
    """Every answer of the results stream by its id; an answer that came twice fails."""
    entries: Any = client.xrange(RESULT_STREAM)
    found = [Answer.from_json(fields[b"answer"]) for _, fields in entries]
    assert len({answer.id for answer in found}) == len(found)
    return {answer.id or "": answer for answer in found}


def test_stuck_device_is_no_progress_while_claims_go_on(parts: PipelineUnderTest, redis_client: redis.Redis) -> None:
    """One image hangs on the device and the lanes are empty: idle claims do not count as progress."""
    hung, go_on = threading.Event(), threading.Event()

    def encode(_: Sequence[Job]) -> None:
        hung.set()
        go_on.wait(30)

    parts.encode = encode
    parts.start()
    enqueue(redis_client, "a")
    assert hung.wait(10)
    try:
        wait_until(lambda: parts.progress.age_s() > 6.5, timeout_s=20)  # an idle claim comes every 5 s
        enqueue(redis_client, "b")
        wait_until(lambda: redis_client.hexists(CLAIMS, "b"), timeout_s=10)
        assert parts.progress.age_s() > 6.5, "a claim is no sign that the device works"
    finally:
        go_on.set()
    wait_until(lambda: len(answers(redis_client)) == 2, timeout_s=10)


def test_claims_are_bounded_while_redis_takes_no_answers(
    parts: PipelineUnderTest, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a replica that never confirms, the worker must not move the whole lane into its memory."""
    refused = threading.Event()

    def commit(_: Any) -> set[str]:
        refused.set()
        raise NotReplicated("a test")

    with monkeypatch.context() as patch:
        patch.setattr(parts.answer_store, "write", commit)
        enqueue(redis_client, *[f"j{n}" for n in range(200)])
        parts.start()
        assert refused.wait(10)
        wait_until(lambda: len(parts.in_flight) >= 2 * SLOTS, timeout_s=10)
        assert redis_client.llen(Lane.BULK.queue) >= 200 - 3 * SLOTS
    wait_until(lambda: len(answers(redis_client)) == 200, timeout_s=20)


def test_failed_encode_thread_counts_deaths_of_its_batch(parts: PipelineUnderTest, redis_client: redis.Redis) -> None:
    """The attempt counts as a worker death: an image that crashes one worker after another becomes a dead letter."""

    def encode(_: Sequence[Job]) -> None:
        raise IndexError("a defect")

    parts.encode = encode
    enqueue(redis_client, "a")
    parts.start()
    wait_until(lambda: parts.fatal, timeout_s=10)
    parts.lease_queue.release(parts.pipeline.stop(grace_s=0.0))
    assert redis_client.hget(ATTEMPTS, "a") == b"1:1"
    assert parts.observer.claims == [True, False]


def test_worker_deaths_are_counted_apart_from_retries(parts: PipelineUnderTest, redis_client: redis.Redis) -> None:
    """A job with nine attempts and two deaths is tried; a job with three deaths is given up, with the reason."""
    redis_client.hset(ATTEMPTS, mapping={"often": "9:2", "deadly": "3:3"})
    enqueue(redis_client, "often", "deadly")
    parts.start()
    wait_until(lambda: len(answers(redis_client)) == 2, timeout_s=10)
    found = answers(redis_client)
    assert (found["often"].status.value, found["often"].attempts) == ("tagged", 10)
    error = found["deadly"].error
    assert error is not None
    assert error.code.value == "attempts_exhausted"


def test_job_claimed_again_during_its_release_is_answered(
    parts: PipelineUnderTest, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its earlier attempt is still being released when a claim brings the job again: it does not wait for a lease."""
    release, seen = parts.lease_queue.release, threading.Event()

    def slow_release(releases: Any) -> int:
        count = release(releases)
        if any(each.id == "a" for each in releases) and not seen.is_set():
            enqueue(redis_client, "b")  # wakes the claim thread, which claims "a" too
            # The claim found "a" still in flight, and gave it back for a moment.
            wait_until(lambda: redis_client.hexists(CLAIMS, "a") or redis_client.zscore(DELAYED, "a"), timeout_s=10)
            seen.set()
        return count

    def mark() -> None:
        if not seen.is_set():
            parts.in_flight.mark_answered_elsewhere(["a"])

    monkeypatch.setattr(parts.lease_queue, "release", slow_release)
    parts.loaders.before = mark
    parts.start()
    enqueue(redis_client, "a")

    def both_answered() -> bool:
        make_maintenance(redis_client).run_once()  # as heartbeats do: it brings back what was delayed
        return {"a", "b"} <= answers(redis_client).keys()

    wait_until(both_answered, timeout_s=20)
    assert answers(redis_client)["a"].attempts == 1


def test_jobs_of_a_lost_claim_reply_go_back_immediately(redis_client: redis.Redis) -> None:
    """The worker runs and does not know these jobs: they do not wait for their leases, and no death is counted."""
    claims = make_lease_queue(redis_client, "w", lease_s=30)
    enqueue(redis_client, "kept")
    kept = [job.id for job in claims.claim(5).jobs]
    enqueue(redis_client, "b", "a")
    claims.claim(5, held=kept)
    claims._may_have_lost_reply = True  # as the client's error would leave it
    again = claims.claim(5, held=kept).jobs
    assert [(job.id, job.attempt, job.deaths) for job in again] == [("b", 1, 0), ("a", 1, 0)]
    assert redis_client.hlen(CLAIMS) == 3


def test_unknown_label_set_is_retried_for_other_workers(redis_client: redis.Redis) -> None:
    """The job is released a few times. Then it is tagged, or rejected where no worker knows the set."""
    claims: Counter[str] = Counter()

    def resolve(name: str) -> LabelSet:
        claims[name] += 1
        if name == "new" and claims[name] == 3:
            return LABELS
        raise Rejected(ErrorCode.UNKNOWN_LABEL_SET, "no such label set", stage=Stage.CLAIM)

    policy = views.pipeline_limits(Settings()).retries[ErrorCode.UNKNOWN_LABEL_SET]
    assert (policy.attempts, policy.first_s) == (4, Settings().retry_first_s)
    quick = {ErrorCode.UNKNOWN_LABEL_SET: RetryPolicy(policy.attempts, 0.01, 0.01)}
    parts = PipelineUnderTest(redis_client, limits=PipelineLimits(slots=SLOTS, max_attempts=3, retries=quick))
    parts.resolve = resolve
    maintenance = make_maintenance(redis_client)
    parts.start()
    try:
        for name in ("new", "wrong"):
            request = Request(image="s3://pictures/cat.jpg", labels=name)
            redis_client.lpush(Lane.BULK.queue, build_message(request, job_id=name, lane=Lane.BULK))

        def has_answers() -> bool:
            maintenance.run_once()
            parts.notifier.notify()
            return len(answers(redis_client)) == 2

        wait_until(has_answers, timeout_s=20, what="two answers")
    finally:
        parts.stop()
    found = answers(redis_client)
    assert (found["new"].status, found["new"].attempts) == (Status.TAGGED, 3)
    assert (found["wrong"].status, found["wrong"].attempts) == (Status.REJECTED, 4)
    assert found["wrong"].error is not None
    assert found["wrong"].error.code is ErrorCode.UNKNOWN_LABEL_SET


def test_unknown_label_set_with_one_attempt_is_rejected() -> None:
    """SHIWU_RETRY with one try."""
    settings = Settings(retry="unknown_label_set=1:1:1")  # type: ignore[arg-type]  # the form of the environment
    assert views.pipeline_limits(settings).retries[ErrorCode.UNKNOWN_LABEL_SET].attempts == 1


def test_full_bulk_slots_cause_no_claims_until_there_is_room(
    parts: PipelineUnderTest, redis_client: redis.Redis
) -> None:
    """The waiting bulk messages wake no thread; an interactive message and a freed slot do."""
    hold = threading.Event()
    parts.encode = lambda _: hold.wait(20) and None
    claims = []
    claim = parts.lease_queue.claim
    # The real claim, with a note of its options.
    parts.lease_queue.claim = lambda *args, **options: claims.append(options) or claim(*args, **options)  # type: ignore[method-assign]  # notes the calls
    redis_client.lpush(Lane.BULK.queue, *[message(f"b{n}", Lane.BULK) for n in range(40)])
    parts.start()
    try:
        wait_until(lambda: claims and claims[-1]["bulk_limit"] == 0, timeout_s=10)
        assert redis_client.llen(Lane.BULK.queue) == 40 - SLOTS * 3 // 4
        redis_client.lpush(Lane.INTERACTIVE.queue, message("i"))
        wait_until(lambda: redis_client.hexists(CLAIMS, "i"), timeout_s=3)
        assert len(claims) < 20, "waiting bulk messages must not keep the claim thread busy"
        hold.set()
        wait_until(lambda: redis_client.llen(Lane.BULK.queue) == 0, timeout_s=10)
    finally:
        hold.set()
        parts.stop()
