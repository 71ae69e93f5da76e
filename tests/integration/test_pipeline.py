"""The pipeline over a real Redis, with loaders and a model that do what a test says."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.broker.redis_errors import NotReplicated
from shiwu.contract import ATTEMPTS, CLAIMS, RESULT_STREAM, Answer, ErrorCode, Lane, Stage, Status
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import FatalError, Rejected
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.loaders.protocol import LoadResult
from shiwu_worker.pipeline.batch_executor import LaunchedBatch
from shiwu_worker.pipeline.pipeline import Pipeline, Stages
from shiwu_worker.pipeline.settle import Settler
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.service.factories import make_limits
from shiwu_worker.stages.batch import Batcher
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from shiwu_worker.stages.claim.notifier import LaneNotifier
from shiwu_worker.stages.commit import Committer
from tests.support.redis_parts import make_committer, make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until

SLOTS = 8
LABELS = LabelSet(None, ("a", "b"))


class Works:
    """A pipeline whose loaders take no time. `encode` may be replaced."""

    def __init__(
        self, client: redis.Redis, *, claims: LeaseQueue | None = None, limits: PipelineLimits | None = None
    ) -> None:
        self.resolve: Callable[[Job], LabelSet] = lambda _: LABELS
        self.encode: Callable[[Sequence[Job]], None] = lambda _: None
        self.fatal: list[FatalError] = []
        self.claiming: list[bool] = []
        self.progress = Progress()
        self.lease_queue = claims or make_lease_queue(client, "w", lease_s=30)
        self.committer = Committer(make_committer(client, "w"), worker="w")
        self.notifier = LaneNotifier(client, block_s=1.0)
        self.settler = Settler(
            self.committer,
            self.lease_queue,
            backoff=RedisBackoff("commit", longest_s=0.1),
            on_settled=lambda jobs: self.pipeline.settled(jobs),  # noqa: PLW0108 bound late
            on_answered=None,
            on_fatal=self.fatal.append,
        )
        stages = Stages(
            lease_queue=self.lease_queue,
            notifier=self.notifier,
            resolve=lambda job: self.resolve(job),  # noqa: PLW0108 bound late
            check_callbacks=lambda _: None,
            load=self._load,
            batcher=Batcher(max_size=4, bulk_share=0.1),
            launch=lambda jobs: LaunchedBatch(tuple(jobs), 1.0),
            finish=lambda launched: self.encode(launched.jobs),
            settle=self.settler.put,
            backoff=RedisBackoff("claim", longest_s=0.1),
        )
        self.pipeline = Pipeline(
            stages,
            limits or PipelineLimits(slots=SLOTS, max_attempts=3),
            progress=self.progress,
            meter=LoadMeter(loader_threads=1),
            on_fatal=self.fatal.append,
            on_claiming=self.claiming.append,
        )

    def _load(self, tickets: Sequence[tuple[int, Job]]) -> None:
        for ticket, job in tickets:
            times = {"started_s": 1.0, "fetched_s": 1.0, "decoded_s": 1.0}
            self.pipeline.loaded([LoadResult(ticket=ticket, slot=job.slot, **times)])

    def start(self) -> None:
        """Start everything."""
        for part in (self.settler, self.notifier, self.pipeline):
            part.start()

    def stop(self) -> None:
        """Stop everything."""
        self.lease_queue.release(self.pipeline.stop(grace_s=0.0))
        self.settler.close(timeout_s=5.0)


@pytest.fixture
def works(redis_client: redis.Redis) -> Iterator[Works]:
    """Not started yet; stopped in the end."""
    made = Works(redis_client)
    yield made
    made.stop()


def enqueue(client: redis.Redis, *ids: str) -> None:
    """Put jobs into the bulk lane."""
    client.lpush(Lane.BULK.queue, *[message(job_id) for job_id in ids])


def answers(client: redis.Redis) -> dict[str, Answer]:
    """Every answer of the stream by its id; one that came twice fails."""
    entries: Any = client.xrange(RESULT_STREAM)
    found = [Answer.from_json(fields[b"answer"]) for _, fields in entries]
    assert len({one.id for one in found}) == len(found)
    return {one.id or "": one for one in found}


def test_a_stuck_device_is_no_progress_although_claims_go_on(works: Works, redis_client: redis.Redis) -> None:
    """One picture hangs on the device, the lanes are empty: idle claims do not make the worker look alive."""
    hung, go_on = threading.Event(), threading.Event()

    def encode(_: Sequence[Job]) -> None:
        hung.set()
        go_on.wait(30)

    works.encode = encode
    works.start()
    enqueue(redis_client, "a")
    assert hung.wait(10)
    try:
        wait_until(lambda: works.progress.age_s() > 6.5, timeout_s=20)  # an idle claim comes every 5 s
        enqueue(redis_client, "b")
        wait_until(lambda: redis_client.hexists(CLAIMS, "b"), timeout_s=10)
        assert works.progress.age_s() > 6.5, "claiming more says nothing of the device"
    finally:
        go_on.set()
    wait_until(lambda: len(answers(redis_client)) == 2, timeout_s=10)


def test_answers_that_redis_does_not_take_bound_the_claims(
    works: Works, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that never confirms must not make the worker move the whole lane into its memory."""
    refused = threading.Event()

    def commit(_: Any) -> set[str]:
        refused.set()
        raise NotReplicated("a test")

    with monkeypatch.context() as patch:
        patch.setattr(works.committer, "commit", commit)
        enqueue(redis_client, *[f"j{n}" for n in range(200)])
        works.start()
        assert refused.wait(10)
        wait_until(lambda: len(works.pipeline.held()) >= 2 * SLOTS, timeout_s=10)
        assert redis_client.llen(Lane.BULK.queue) >= 200 - 3 * SLOTS
    wait_until(lambda: len(answers(redis_client)) == 200, timeout_s=20)


def test_an_unexpected_end_of_the_encode_thread_accuses_its_batch(works: Works, redis_client: redis.Redis) -> None:
    """The try counts as a death: a picture that ends one worker after another ends in the dead letters."""

    def encode(_: Sequence[Job]) -> None:
        raise IndexError("a defect")

    works.encode = encode
    enqueue(redis_client, "a")
    works.start()
    wait_until(lambda: works.fatal, timeout_s=10)
    works.lease_queue.release(works.pipeline.stop(grace_s=0.0))
    assert redis_client.hget(ATTEMPTS, "a") == b"1:1"
    assert works.claiming == [True, False]


def test_workers_that_die_are_counted_apart_from_retries(works: Works, redis_client: redis.Redis) -> None:
    """Nine tries and two deaths: it is tried. Three deaths: it is given up, with the reason."""
    redis_client.hset(ATTEMPTS, mapping={"often": "9:2", "deadly": "3:3"})
    enqueue(redis_client, "often", "deadly")
    works.start()
    wait_until(lambda: len(answers(redis_client)) == 2, timeout_s=10)
    found = answers(redis_client)
    assert (found["often"].status.value, found["often"].attempts) == ("tagged", 10)
    error = found["deadly"].error
    assert error is not None
    assert error.code.value == "attempts_exhausted"


def test_a_job_that_comes_back_before_it_is_settled_here(
    works: Works, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first life is still being given back when a claim brings it again: it is not left to a lease."""
    release, seen = works.lease_queue.release, threading.Event()

    def slow_release(releases: Any) -> int:
        count = release(releases)
        if any(one.id == "a" for one in releases) and not seen.is_set():
            enqueue(redis_client, "bell")  # wakes the claimer, who finds "a" too
            wait_until(lambda: redis_client.hexists(CLAIMS, "a"), timeout_s=10)
            seen.set()
        return count

    def encode(jobs: Sequence[Job]) -> None:
        if not seen.is_set():
            works.pipeline.ended([job.id for job in jobs if job.id == "a"])
            for job in jobs:
                job.unwanted(0.0)

    monkeypatch.setattr(works.lease_queue, "release", slow_release)
    works.encode = encode
    works.start()
    enqueue(redis_client, "a")

    def both_answered() -> bool:
        make_maintenance(redis_client).run_once()  # as heartbeats do: it brings back what was delayed
        return {"a", "bell"} <= answers(redis_client).keys()

    wait_until(both_answered, timeout_s=20)
    assert answers(redis_client)["a"].attempts == 1


def test_what_a_lost_reply_had_claimed_goes_back_at_once(redis_client: redis.Redis) -> None:
    """The worker lives and knows nothing of these jobs: they are not left to their lease, and no death is counted."""
    claims = make_lease_queue(redis_client, "w", lease_s=30)
    enqueue(redis_client, "kept")
    kept = [job.id for job in claims.claim(5).jobs]
    enqueue(redis_client, "b", "a")
    claims.claim(5, held=kept)
    claims._is_reply_lost = True  # as the client's error would leave it
    again = claims.claim(5, held=kept).jobs
    assert [(job.id, job.attempt, job.deaths) for job in again] == [("b", 1, 0), ("a", 1, 0)]
    assert redis_client.hlen(CLAIMS) == 3


def test_a_job_with_an_unknown_label_set_waits_for_a_worker_that_knows_it(redis_client: redis.Redis) -> None:
    """During a rollout: the job is given back a few times, then it is tagged or, by its name alone, rejected."""
    claims: Counter[str] = Counter()

    def resolve(job: Job) -> LabelSet:
        claims[job.id] += 1
        if job.id == "new" and claims[job.id] == 3:
            return LABELS
        raise Rejected(ErrorCode.UNKNOWN_LABEL_SET, "no such label set", stage=Stage.CLAIM)

    policy = make_limits(Settings(), SimpleNamespace(batch_sizes=(1,))).retries[ErrorCode.UNKNOWN_LABEL_SET]
    assert (policy.attempts, policy.first_s) == (4, Settings().retry_first_s)
    quick = {ErrorCode.UNKNOWN_LABEL_SET: RetryPolicy(policy.attempts, 0.01, 0.01)}
    works = Works(redis_client, limits=PipelineLimits(slots=SLOTS, max_attempts=3, retries=quick))
    works.resolve = resolve
    upkeep = make_maintenance(redis_client)
    works.start()
    try:
        enqueue(redis_client, "new", "wrong")

        def has_answers() -> bool:
            upkeep.run_once()
            works.notifier.ring()
            return len(answers(redis_client)) == 2

        wait_until(has_answers, timeout_s=20, what="two answers")
    finally:
        works.stop()
    found = answers(redis_client)
    assert (found["new"].status, found["new"].attempts) == (Status.TAGGED, 3)
    assert (found["wrong"].status, found["wrong"].attempts) == (Status.REJECTED, 4)
    assert found["wrong"].error is not None
    assert found["wrong"].error.code is ErrorCode.UNKNOWN_LABEL_SET


def test_an_operator_may_have_unknown_label_sets_rejected_immediately() -> None:
    """SHIWU_RETRY with one try."""
    settings = Settings(retry="unknown_label_set=1:1:1")  # type: ignore[arg-type]  # as the environment says it
    assert make_limits(settings, SimpleNamespace(batch_sizes=(1,))).retries[ErrorCode.UNKNOWN_LABEL_SET].attempts == 1
