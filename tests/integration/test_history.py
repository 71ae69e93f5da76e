"""Earlier attempts of a job: where they are recorded, how the answer lists them, and when they are deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from shiwu import Client
from shiwu.broker.message_writer import build_message
from shiwu.contract import (
    ATTEMPTS,
    HISTORIES,
    HISTORIES_EXPIRY,
    AttemptEnd,
    ErrorCode,
    Lane,
    Request,
    Stage,
    Status,
)
from shiwu_worker.jobs.job import Job, Release, open_job
from shiwu_worker.stages.commit import to_entries
from tests.support import pictures
from tests.support.picture_server import PictureServer, Reply
from tests.support.redis_parts import make_answer_store, make_lease_queue, make_maintenance
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

SENT_MS = 60_000.0
"""How long before the test its jobs were enqueued."""


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the real server."""
    with redis.Redis.from_url(redis_url) as connected:
        yield connected


def now_ms(client: redis.Redis) -> float:
    """Redis' clock."""
    seconds, micros = client.time()
    return float(seconds * 1000 + micros / 1000)


def send(client: redis.Redis, **options: Any) -> None:
    """A job that was enqueued a minute ago."""
    message = build_message(
        Request(image="s3://b/k"), job_id="job", lane=Lane.BULK, sent_ms=now_ms(client) - SENT_MS, **options
    )
    client.lpush("shiwu.bulk", message)


def claim(client: redis.Redis, name: str = "worker-1.0a0a", *, lease_s: float = 60.0) -> Job:
    """Claim the job as a worker does."""
    [claimed] = make_lease_queue(client, name, lease_s=lease_s).claim(1).jobs
    return open_job(claimed)


def answered(job: Job) -> Any:
    """The answer of the job, as JSON."""
    [entry] = to_entries([job], worker="last", now_s=time.monotonic())
    return json.loads(entry.answer.to_json())


def test_first_attempt_has_no_history(client: redis.Redis) -> None:
    """All the time since the enqueue is the wait in the lane."""
    send(client)
    job = claim(client)
    answer = answered(job)
    assert "history" not in answer
    assert "earlier" not in answer["timing"]
    assert answer["timing"]["queue"] == pytest.approx(SENT_MS, abs=2000)
    answered_at = datetime.fromisoformat(answer["answered_at"])
    assert answer["answered_at"].endswith("Z")
    assert answered_at.timestamp() * 1000 == pytest.approx(now_ms(client), abs=2000)
    assert not client.exists(HISTORIES, HISTORIES_EXPIRY)


def test_retry_is_listed_with_code_time_and_pause(client: redis.Redis) -> None:
    """The wait in the lane begins after the pause; what was before is `earlier`, and all adds up."""
    send(client)
    claim(client)
    released_ms = now_ms(client)
    ending = f"{ErrorCode.SOURCE_UNAVAILABLE}|{Stage.FETCH}"
    make_lease_queue(client, "worker-1.0a0a").release([Release("job", delay_s=0.3, counts=True, ending=ending)])
    wait_until(lambda: make_maintenance(client).run_once().promoted == 1, timeout_s=5)
    job = claim(client, "worker-2.0b0b")
    answer = answered(job)
    [tried] = answer["history"]
    at = datetime.fromisoformat(tried.pop("at"))
    assert tried == {
        "attempt": 1,
        "code": "source_unavailable",
        "stage": "fetch",
        "worker": "worker-1",
        "pause": 300.0,
    }
    assert at.timestamp() * 1000 == pytest.approx(released_ms, abs=1000)
    timing = answer["timing"]
    assert answer["attempts"] == 2
    assert timing["queue"] < 5000
    assert timing["earlier"] == pytest.approx(SENT_MS + 300, abs=3000)
    assert sum(timing.values()) - timing["total"] == pytest.approx(timing["total"], abs=0.01)
    assert job.history[0].code is ErrorCode.SOURCE_UNAVAILABLE
    assert job.history[0].stage is Stage.FETCH


def test_crash_of_a_worker_is_listed(client: redis.Redis) -> None:
    """The process that requeues a job records which worker held it."""
    send(client)
    claim(client, "my.host|1.0a0a".replace("|", "-"), lease_s=0.05)
    wait_until(lambda: make_maintenance(client).run_once().reaped == 1, timeout_s=5)
    job = claim(client)
    [tried] = job.history
    assert (tried.attempt, tried.code, tried.stage, tried.worker, tried.pause) == (
        *(1, AttemptEnd.WORKER_LOST, None),
        *("my.host-1", None),
    )
    assert type(tried.code) is AttemptEnd
    assert (job.moments.earlier_ms or 0.0) > SENT_MS - 2000


def test_stop_of_a_worker_is_listed_and_counts_no_attempt(client: redis.Redis) -> None:
    """A drained worker gives the job back: the attempt's number stays, the wait begins anew."""
    send(client)
    claim(client)
    ending = f"{AttemptEnd.WORKER_STOPPED}|"
    make_lease_queue(client, "worker-1.0a0a").release([Release("job", ending=ending)])
    job = claim(client)
    assert (job.attempt, [(one.attempt, one.code) for one in job.history]) == (1, [(1, "worker_stopped")])
    assert (job.moments.queue_ms or 0.0) < 5000


def test_history_keeps_the_last_ten_attempts(client: redis.Redis) -> None:
    """However often a job comes back, its record does not grow without end."""
    send(client)
    for _ in range(12):
        claim(client)
        release = Release("job", delay_s=0.001, counts=True, ending="source_error|fetch")
        make_lease_queue(client, "worker-1.0a0a").release([release])
        wait_until(lambda: make_maintenance(client).run_once().promoted == 1, timeout_s=5)
    assert [one.attempt for one in claim(client).history] == list(range(3, 13))
    assert (client.zscore(HISTORIES_EXPIRY, "job") or 0) == pytest.approx(now_ms(client) + 7 * 86_400_000, abs=60_000)
    client.zadd(HISTORIES_EXPIRY, {"job": 1.0})
    make_maintenance(client).run_once()
    assert not client.exists(HISTORIES, HISTORIES_EXPIRY), "dropped when it is too old"


@pytest.mark.parametrize("how", ["answered", "cancelled"])
def test_history_ends_with_the_answer(client: redis.Redis, redis_url: str, how: str) -> None:
    """Neither an answer nor a cancel leaves it behind."""
    send(client)
    claim(client)
    release = Release("job", delay_s=0.001 if how == "answered" else 60.0, counts=True, ending="source_error|fetch")
    make_lease_queue(client, "worker-1.0a0a").release([release])
    assert client.hkeys(HISTORIES) == [b"job"]
    if how == "answered":
        wait_until(lambda: make_maintenance(client).run_once().promoted == 1, timeout_s=5)
        now_s = time.monotonic()
        committer = make_answer_store(client, "w")
        committer.write(to_entries([claim(client)], worker="w", now_s=now_s))
    else:
        with Client(redis_url) as ours:
            assert ours.cancel("job") == ["job"]
            cancelled = ours.answer("job")
        assert cancelled is not None
        assert cancelled.answered_at is not None
        assert abs(datetime.now(UTC) - cancelled.answered_at) < timedelta(seconds=5)
    assert not client.exists(HISTORIES, HISTORIES_EXPIRY)
    assert client.hlen(ATTEMPTS) == 0


def test_countdown_is_no_wait_in_the_lane(client: redis.Redis) -> None:
    """The wait begins when the job was due."""
    send(client, eta_ms=now_ms(client) - 10_000)
    timing = answered(claim(client))["timing"]
    assert timing["queue"] == pytest.approx(10_000, abs=2000)
    assert timing["earlier"] == pytest.approx(SENT_MS - 10_000, abs=2000)


def test_unreadable_lines_of_a_history_are_ignored(client: redis.Redis) -> None:
    """The job keeps those that can be read."""
    send(client)
    client.hset(ATTEMPTS, "job", "1:0")
    client.hset(
        HISTORIES, "job", b"no|line\n\xff|||||\nx|code|stage|1|0|w\n1|code|stage|1e99|0|w\n2|new_code|weigh|5|0|w.1"
    )
    assert [(one.attempt, one.code, one.stage) for one in claim(client).history] == [(2, "new_code", "weigh")]
    make_maintenance(client).run_once()
    assert client.zscore(HISTORIES_EXPIRY, "job"), "one without a time gets one"


def test_answer_of_a_worker_lists_its_retries(shared_worker: WorkerProcess, http_server: PictureServer) -> None:
    """A source that is away for one try: the answer lists it, the log line has reference and cause."""
    good = Reply.picture(pictures.png(pictures.picture("熊猫")), content_type="image/png")
    url = http_server.serve("/later.png", *[Reply.error(503)] * 3, good)
    with Client(shared_worker.redis_url) as client:
        result = client.wait(client.enqueue(f"{url}?signature=hush", id="history-retry"), timeout_s=60)
    assert (result.status, result.attempts) == (Status.TAGGED, 2)
    assert result.history is not None
    [tried] = result.history
    assert (tried.attempt, tried.code, tried.stage, tried.worker) == (1, "source_unavailable", "fetch", "shared")
    assert result.timing.earlier is not None
    assert result.timing.earlier >= (tried.pause or 0.0) > 0
    assert (result.timing.queue or 0.0) < 10_000
    assert result.answered_at is not None
    assert result.answered_at > tried.at
    lines = [json.loads(line) for line in shared_worker.log_text().splitlines() if '"history-retry"' in line]
    [later] = [line for line in lines if line["event"] == "job_retried"]
    assert (later["image"], later["code"], later["stage"]) == (url, "source_unavailable", "fetch")
    assert "503" in later["error"]
