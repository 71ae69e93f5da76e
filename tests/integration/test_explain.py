"""`shiwu explain`: a job is found in each state that it can be in, and its answer is shown as a receipt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import pytest
import redis
from click.testing import CliRunner

from shiwu import Client
from shiwu.broker.answers import AnswerEntry
from shiwu.cli import main
from shiwu.client import job_report
from shiwu.client.job_report import JobState
from shiwu.contract import (
    QUARANTINE_OWNER,
    REVOKED,
    Answer,
    Cache,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    Stage,
    Status,
    Tag,
    Timing,
    result_key,
)
from shiwu_worker.jobs.job import Release
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue, make_maintenance
from tests.support.waiting import wait_until

IMAGE = "https://example.org/panda.jpg?token=secret"


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    """An operator's client."""
    with Client(redis_url) as connected:
        yield connected


def explained(redis_url: str, job_id: str) -> tuple[int, str]:
    """Exit code and output of `shiwu explain`."""
    done = CliRunner().invoke(main, ["--redis-url", redis_url, "explain", job_id])
    return done.exit_code, done.output


def test_waiting_job_has_a_place_in_its_lane(client: Client, redis_url: str) -> None:
    """Messages of more urgent steps of its lane count as before it; its image is shown without the query."""
    for job_id, priority in (("first", 3), ("second", 3), ("urgent", 0), ("third", 3)):
        client.enqueue(IMAGE, id=job_id, lane="bulk", priority=priority, answer_by_s=60)
    report = client.explain("third")
    assert (report.state, report.lane, report.ahead, report.image) == (JobState.WAITING, Lane.BULK, 3, IMAGE)
    code, output = explained(redis_url, "third")
    assert code == 0
    assert "third  waits in the lane bulk, 3 messages before it" in output
    assert "image https://example.org/panda.jpg\n" in output
    assert "has an answer by " in output


def test_job_that_revoke_named_is_shown_as_such(client: Client, redis_client: redis.Redis) -> None:
    client.enqueue(IMAGE, id="k1")
    redis_client.zadd(REVOKED, {"k1": 1e15})
    assert client.explain("k1").is_revoked


def test_job_far_back_in_a_lane_is_not_called_unknown(
    client: Client, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_report, "MAX_SEARCHED", 4)
    monkeypatch.setattr(job_report, "PAGE", 2)
    for number in range(6):
        client.enqueue(IMAGE, id=f"k{number}")
    assert client.explain("k3").ahead == 3
    report = client.explain("k5")
    assert (report.state, report.is_searched_whole) == (JobState.UNKNOWN, False)
    assert "not among the next 20,000 messages" in explained(redis_url, "k5")[1]


def test_claimed_job_names_its_worker_and_lease(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    client.enqueue(IMAGE, id="k1")
    make_lease_queue(redis_client, "gpu-host-0.ab12", lease_s=30).claim(1)
    report = client.explain("k1")
    assert (report.state, report.worker, report.attempt) == (JobState.CLAIMED, "gpu-host-0", 1)
    assert report.lease_ms == pytest.approx(report.now_ms + 30_000, abs=5000)
    assert "k1  is held by gpu-host-0, attempt 1" in explained(redis_url, "k1")[1]


def test_expired_lease_is_named(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    client.enqueue(IMAGE, id="k1")
    make_lease_queue(redis_client, "w.1", lease_s=0.001).claim(1)
    wait_until(lambda: client.explain("k1").now_ms > (client.explain("k1").lease_ms or 0), timeout_s=5)
    assert "the lease has expired: the worker is gone" in explained(redis_url, "k1")[1]


def test_delayed_job_shows_its_earlier_attempt(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    client.enqueue(IMAGE, id="k1", lane="bulk")
    worker = make_lease_queue(redis_client, "gpu-host-1.ab12")
    worker.claim(1)
    worker.release([Release("k1", delay_s=40, counts=True, ending="source_unavailable|fetch")])
    report = client.explain("k1")
    assert (report.state, report.lane, report.image) == (JobState.DELAYED, Lane.BULK, IMAGE)
    assert report.due_ms == pytest.approx(report.now_ms + 40_000, abs=5000)
    [attempt] = report.history
    assert (attempt.worker, attempt.code, attempt.stage) == ("gpu-host-1", ErrorCode.SOURCE_UNAVAILABLE, Stage.FETCH)
    output = explained(redis_url, "k1")[1]
    assert "before: attempt 1, gpu-host-1, source_unavailable, in fetch" in output
    assert "then a pause of 40.0 s" in output


def test_quarantined_job_is_found(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    for job_id in ("k1", "k2"):
        client.enqueue(IMAGE, id=job_id, lane="bulk")
    for name in ("w.1", "w.2"):
        make_lease_queue(redis_client, name, lease_s=0.001).claim(2)
        wait_until(lambda: make_maintenance(redis_client).run_once().reaped == 2, timeout_s=5)
    redis_client.delete(QUARANTINE_OWNER)
    report = client.explain("k2")
    assert (report.state, report.lane, report.deaths) == (JobState.QUARANTINED, Lane.BULK, 2)
    assert "2 workers died while they held it" in explained(redis_url, "k2")[1]


def write_answers(redis_client: redis.Redis, client: Client, *answers: Answer) -> None:
    """Enqueue a job for each answer, claim it and answer it."""
    for each in answers:
        client.enqueue(IMAGE, id=each.id, lane="interactive")
        [claimed] = make_lease_queue(redis_client, "w.1").claim(1).jobs
        is_dead = each.error is not None
        entry = AnswerEntry(id=claimed.id, answer=each, is_dead=is_dead, message=b"shiwu.bulk|{}" if is_dead else b"")
        make_answer_store(redis_client, "w.1").write([entry])


def tagged(job_id: str, *, fetch_ms: float) -> Answer:
    """An answer whose image took this long to fetch."""
    return Answer(
        id=job_id,
        status=Status.TAGGED,
        image=ImageInfo(reference="https://example.org/panda.jpg", format="JPEG", width=640, height=480),
        tags=(Tag("熊猫", 0.84, 0.3), Tag("猫", 0.1, 0.2)),
        timing=Timing(queue=12, claim=1, fetch=fetch_ms, decode=3, batch=2, encode=4, score=0.2, total=22.2 + fetch_ms),
        batch_size=8,
        worker="gpu-host-0",
        lane=Lane.INTERACTIVE,
        answered_at=datetime(2026, 11, 30, 12, 0, 1, tzinfo=UTC),
    )


def test_receipt_compares_each_stage_with_the_usual(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    """An unusual stage is named with its advice; times of the job itself do not count as usual."""
    usual = [tagged(f"usual-{number}", fetch_ms=50 + number) for number in range(20)]
    write_answers(redis_client, client, *usual, tagged("k1", fetch_ms=4000))
    report = client.explain("k1")
    assert (report.state, report.sample) == (JobState.ANSWERED, 20)
    assert (report.usual["fetch"].p50, report.usual["fetch"].p95) == (60, 69)
    code, output = explained(redis_url, "k1")
    assert code == 0
    assert output.splitlines() == [
        "k1  tagged 熊猫 0.84, 猫 0.10",
        "  image https://example.org/panda.jpg, 640x480 JPEG",
        "  lane interactive, worker gpu-host-0, attempt 1, batch of 8, answered 2026-11-30 12:00:01 UTC",
        "  queue        12 ms    0%                           usual p50 12 ms, p95 12 ms",
        "  claim       1.0 ms    0%                           usual p50 1.0 ms, p95 1.0 ms",
        "  fetch        4.0 s   99% ########################  usual p50 60 ms, p95 69 ms",
        "  decode      3.0 ms    0%                           usual p50 3.0 ms, p95 3.0 ms",
        "  batch       2.0 ms    0%                           usual p50 2.0 ms, p95 2.0 ms",
        "  encode      4.0 ms    0%                           usual p50 4.0 ms, p95 4.0 ms",
        "  score       0.2 ms    0%                           usual p50 0.2 ms, p95 0.2 ms",
        "  total        4.0 s                                 usual p50 82 ms, p95 91 ms",
        "  it waited for the source of the image; its host or bucket is slow from here, 58 times the usual p95",
    ]


def test_job_that_shared_an_encoding_waited_for_the_other_job(
    client: Client, redis_client: redis.Redis, redis_url: str
) -> None:
    """And not for other batches of the device."""
    shared = msgspec.structs.replace(tagged("k1", fetch_ms=5), timing=Timing(fetch=5, batch=900, total=905))
    write_answers(redis_client, client, shared, msgspec.structs.replace(shared, id="k2", cache=Cache.JOINED))
    assert "  it waited for the device: other batches came first" in explained(redis_url, "k1")[1]
    assert (
        "  it waited for another job with the same image, whose encoding serves both" in explained(redis_url, "k2")[1]
    )


def test_dead_letter_tells_how_to_requeue(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    error = ErrorInfo(ErrorCode.SOURCE_NOT_FOUND, "HTTP 404", Stage.FETCH)
    write_answers(redis_client, client, Answer(id="k1", status=Status.REJECTED, error=error, lane=Lane.INTERACTIVE))
    output = explained(redis_url, "k1")[1]
    assert "k1  rejected source_not_found: HTTP 404" in output
    assert "`shiwu dead requeue k1` enqueues it again" in output


def test_expired_answer_is_told_from_an_unknown_id(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    client.enqueue(IMAGE, id="k1")
    [claimed] = make_lease_queue(redis_client, "w.1").claim(1).jobs
    make_answer_store(redis_client, "w.1").write([answer(claimed)])
    redis_client.delete(result_key("k1"))
    assert client.explain("k1").state is JobState.ANSWER_EXPIRED
    assert explained(redis_url, "k1")[0] == 0


def test_unknown_id_exits_with_one(redis_url: str) -> None:
    code, output = explained(redis_url, "never")
    assert (code, output) == (
        1,
        "never  is unknown: never enqueued in this database, or answered so long ago that nothing is left of it\n",
    )


def test_result_of_another_task_is_foreign(client: Client, redis_client: redis.Redis) -> None:
    redis_client.set(result_key("k1"), json.dumps({"status": "SUCCESS", "task_id": "k1", "result": 3}))
    assert client.explain("k1").state is JobState.FOREIGN


def test_json_holds_the_whole_report(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    write_answers(redis_client, client, tagged("k0", fetch_ms=5), tagged("k1", fetch_ms=5))
    done = CliRunner().invoke(main, ["--redis-url", redis_url, "explain", "--json", "k1"])
    read = json.loads(done.output)
    assert (read["state"], read["result"]["tags"][0]["label"], read["usual"]["fetch"]["p50"]) == ("answered", "熊猫", 5)
