"""New labels in bulk, on a real worker and in a pipeline whose text tower the test controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

from shiwu.broker.message_writer import build_message
from shiwu.contract import CLAIMS, COUNTERS, DELAYED, RESULT_STREAM, Answer, ErrorCode, Lane, Request, Status
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.policy.limits import LABEL_JOBS_PER_LANE, LabelLimits
from shiwu_worker.policy.retry import PipelineLimits
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support import pictures
from tests.support.ask import ask
from tests.support.pipelines import LABELS, PipelineUnderTest
from tests.support.servers import S3Server, Valkey, WorkerProcess
from tests.support.waiting import wait_until

LABELS_EACH = 400
BULK_JOBS = 200
INTERACTIVE_JOBS = 20
MAX_BULK_PER_INTERACTIVE = 2


def answers(client: redis.Redis) -> dict[str, Answer]:
    """Every answer of the results stream by its id."""
    entries: Any = client.xrange(RESULT_STREAM)
    found = [Answer.from_json(fields[b"answer"]) for _, fields in entries]
    return {answer.id or "": answer for answer in found}


def new_labels(job: int, count: int) -> tuple[str, ...]:
    """Labels that no other job has."""
    return tuple(f"{job}-{number}" for number in range(count))


def enqueue(
    client: redis.Redis, job_id: str, labels: tuple[str, ...], *, lane: Lane = Lane.BULK, image: str = "s3://b/k.jpg"
) -> None:
    """Put a job into its lane."""
    client.lpush(lane.queue, build_message(Request(image=image, labels=labels), job_id=job_id, lane=lane))


def test_new_labels_in_bulk_do_not_delay_interactive_jobs(tmp_path: Path, s3: S3Server) -> None:
    """While two hundred jobs bring 400 labels each, every interactive job passes nearly all of them."""
    image = s3.put("new-labels.jpg", pictures.jpeg(pictures.picture()))
    with (
        Valkey(folder=tmp_path / "valkey") as server,
        server.client() as client,
        WorkerProcess(redis_url=server.url, folder=tmp_path, env=s3.env, max_batch=8) as worker,
    ):
        worker.wait_ready()
        for number in range(BULK_JOBS):
            enqueue(client, f"bulk-{number}", new_labels(number, LABELS_EACH), image=image)
        wait_until(lambda: client.hlen(CLAIMS) >= 8, timeout_s=30, what="claimed bulk jobs")
        before = client.xlen(RESULT_STREAM)
        for number in range(INTERACTIVE_JOBS):
            assert ask(server.url, image, f"user-{number}", labels="six-zh").status is Status.TAGGED
        bulk_answers = client.xlen(RESULT_STREAM) - before - INTERACTIVE_JOBS
        assert bulk_answers <= MAX_BULK_PER_INTERACTIVE * INTERACTIVE_JOBS
        wait_until(lambda: client.xlen(RESULT_STREAM) > before + INTERACTIVE_JOBS, timeout_s=60, what="a bulk answer")
        counters: Any = client.hgetall(COUNTERS)
        assert b"reaped" not in counters
        assert "worker_stuck" not in worker.log_text()


class Tower:
    """A text tower that remembers what it encoded, and fails on the text `bad`."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector for all texts."""
        if "bad" in texts:
            raise ValueError("a kernel failed")
        self.texts += texts
        return np.ones((len(texts), 1), np.float32)

    def tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """A token for each letter."""
        return [LabelTokens(tuple(map(ord, label)), is_readable=True) for label in labels]


class SlowBank(LabelBank):
    """A label bank whose every label costs ten portions, by its own account, and no time."""

    def __init__(self, tower: Tower) -> None:
        super().__init__(
            sets={},
            default="",
            encode_texts=tower.encode,
            label_tokens=tower.tokens,
            max_cached=1000,
            has_bias=True,
        )
        self.cost.learn = lambda **_: None  # type: ignore[method-assign]  # the cost stays what it is set to
        self.cost.seconds = lambda units: 0.2 * units / 3  # type: ignore[method-assign]  # as above


@pytest.fixture
def tower() -> Tower:
    """The text tower of `parts`."""
    return Tower()


@pytest.fixture
def parts(redis_client: redis.Redis, tower: Tower) -> Iterator[PipelineUnderTest]:
    """A pipeline with a label bank, which is stopped after the test."""
    made = PipelineUnderTest(
        redis_client,
        limits=PipelineLimits(slots=4, max_attempts=3),
        label_bank=SlowBank(tower),
        label_limits=LabelLimits(max_request_s=20.0),
    )
    yield made
    made.stop()


def test_jobs_with_new_labels_are_answered_with_them(
    parts: PipelineUnderTest, redis_client: redis.Redis, tower: Tower
) -> None:
    """Each job gets the vectors of its own labels, and labels of several jobs are encoded once."""
    seen: dict[str, tuple[str, ...]] = {}
    parts.encode = lambda jobs: seen.update({job.id: job.labels.label_set.words for job in jobs if job.labels})
    for number in range(12):
        enqueue(redis_client, f"j{number}", new_labels(number % 4, 5))
    parts.start()
    wait_until(lambda: len(answers(redis_client)) == 12, timeout_s=20)
    assert seen == {f"j{number}": new_labels(number % 4, 5) for number in range(12)}
    assert len(tower.texts) == 20
    assert len(parts.labels) == 0


def test_labels_that_fail_cost_only_their_jobs(parts: PipelineUnderTest, redis_client: redis.Redis) -> None:
    """The jobs of these labels are answered `encode_failed`; the others, and the worker, go on."""
    for number in range(6):
        enqueue(redis_client, f"j{number}", ("bad", "x") if number % 2 else ("good", "x"))
    enqueue(redis_client, "dear", new_labels(0, 1000))
    parts.start()
    wait_until(lambda: len(answers(redis_client)) == 7, timeout_s=20)
    codes = {job_id: answer.error and answer.error.code for job_id, answer in answers(redis_client).items()}
    assert codes == {
        **{f"j{number}": ErrorCode.ENCODE_FAILED if number % 2 else None for number in range(6)},
        "dear": ErrorCode.LABELS_TOO_COSTLY,
    }
    assert not parts.fatal


def test_waiting_jobs_leave_room_for_interactive_ones(
    parts: PipelineUnderTest, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No label is encoded: bulk jobs wait up to their bound, the rest goes back uncounted, interactive jobs pass."""
    monkeypatch.setattr(parts.labels, "wait_s", lambda **_: None)
    for number in range(40):
        enqueue(redis_client, f"bulk-{number}", new_labels(number, 5))
    parts.start()
    wait_until(lambda: redis_client.zcard(DELAYED) == 40 - LABEL_JOBS_PER_LANE, timeout_s=20)
    assert len(parts.labels) == LABEL_JOBS_PER_LANE
    assert not any(release.release.counts for release in parts.observer.released)
    known = LABELS.words
    parts.labels._bank.encoded(parts.labels._bank.resolve(known))
    for number in range(20):
        enqueue(redis_client, f"user-{number}", known, lane=Lane.INTERACTIVE)
    wait_until(lambda: len(answers(redis_client)) == 20, timeout_s=20)
    assert len(parts.labels) == LABEL_JOBS_PER_LANE
