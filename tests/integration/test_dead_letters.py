"""Dead letters: jobs that ended without tags are kept, listed, requeued and dropped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator

import pytest
import redis
from click.testing import CliRunner

from shiwu import Client, DeadFilter
from shiwu.broker.answers import HEAD_BYTES, AnswerEntry, AnswerStore
from shiwu.broker.retention import Retention
from shiwu.cli import main
from shiwu.contract import (
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    Answer,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    Stage,
    Status,
    result_key,
)
from shiwu_worker.jobs.job import open_job
from shiwu_worker.stages.commit import to_entries
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.both_clients import OpenClient
from tests.support.picture_server import PictureServer, Reply
from tests.support.redis_parts import answer, make_lease_queue, make_maintenance
from tests.support.waiting import wait_until


@pytest.fixture
def client(open_client: OpenClient, redis_url: str) -> Iterator[Client]:
    """A producer's client."""
    with open_client(redis_url) as connected:
        yield connected


def write_dead_letter(
    redis_client: redis.Redis,
    client: Client,
    job_id: str,
    *,
    code: ErrorCode = ErrorCode.SOURCE_UNAVAILABLE,
    stage: Stage = Stage.FETCH,
    dead_length: int = 1000,
) -> None:
    """Enqueue a job, claim it and end it without tags."""
    client.enqueue(f"s3://pictures/{job_id}.jpg", id=job_id, lane="bulk")
    [claimed] = make_lease_queue(redis_client, "w").claim(1).jobs
    status = Status.FAILED if code is ErrorCode.SOURCE_UNAVAILABLE else Status.REJECTED
    answer = Answer(
        id=job_id,
        status=status,
        image=ImageInfo(reference=f"s3://pictures/{job_id}.jpg"),
        error=ErrorInfo(code=code, message="so it was", stage=stage),
        attempts=3,
        worker="w",
    )
    message = claimed.key.encode() + b"|" + claimed.raw
    entry = AnswerEntry(answer=answer, id=job_id, message=message, is_dead=True)
    AnswerStore(redis_client, token="w", retention=lambda: Retention(dead_length=dead_length)).write([entry])


def test_dead_letter_has_message_and_answer(client: Client, redis_client: redis.Redis) -> None:
    """Message, error, stage, attempts, worker, and the time when the job ended."""
    write_dead_letter(redis_client, client, "one")
    letter = client.dead_letter("one")
    assert letter is not None
    assert letter.result.error is not None
    assert (letter.lane, letter.result.attempts, letter.result.worker) == (Lane.BULK, 3, "w")
    assert (letter.result.error.code, letter.result.error.stage) == (ErrorCode.SOURCE_UNAVAILABLE, Stage.FETCH)
    assert json.loads(letter.message)["headers"]["id"] == "one"
    assert abs(letter.died_ms - client.server_time_ms()) < 60_000
    assert client.dead_letter("other") is None


def test_dead_filter_selects_by_all_fields(client: Client, redis_client: redis.Redis) -> None:
    """By code, stage, status, part of the reference and age; newest first, up to the limit."""
    write_dead_letter(redis_client, client, "a1")
    write_dead_letter(redis_client, client, "a2", code=ErrorCode.SOURCE_NOT_FOUND)
    write_dead_letter(redis_client, client, "b1", code=ErrorCode.PICTURE_BROKEN, stage=Stage.DECODE)

    def ids(**fields: object) -> list[str]:
        return [letter.id for letter in client.dead_letters(DeadFilter(**fields))]  # type: ignore[arg-type]  # fields of DeadFilter

    assert set(ids()) == {"a1", "a2", "b1"}
    assert ids(code="source_not_found") == ["a2"]
    assert ids(stage="decode") == ["b1"]
    assert set(ids(status="rejected")) == {"a2", "b1"}
    assert set(ids(image="/a")) == {"a1", "a2"}
    assert ids(older_s=60) == []
    assert set(ids(newer_s=60)) == {"a1", "a2", "b1"}
    assert len(list(client.dead_letters(limit=2))) == 2


@pytest.mark.parametrize(("limit_s", "is_older"), [(0.0, True), (60.0, True), (120.0, False), (90_000.0, False)])
def test_dead_filter_compares_ages_in_seconds(
    client: Client, redis_client: redis.Redis, limit_s: float, is_older: bool
) -> None:
    """A letter of 90 s ago is either older or newer than a limit."""
    write_dead_letter(redis_client, client, "one")
    redis_client.zadd(DEAD, {"one": client.server_time_ms() - 90_000})
    older = [letter.id for letter in client.dead_letters(DeadFilter(older_s=limit_s))]
    newer = [letter.id for letter in client.dead_letters(DeadFilter(newer_s=limit_s))]
    assert (older, newer) == ((["one"], []) if is_older else ([], ["one"]))


def test_requeue_starts_again_with_the_same_id(client: Client, redis_client: redis.Redis) -> None:
    """The old answer is removed, attempts start at 1, and the job is answered once like any other."""
    write_dead_letter(redis_client, client, "one")
    assert client.answer("one") is not None
    assert client.requeue(["one", "never-was"]) == ["one"]
    assert client.answer("one") is None
    assert client.requeue(["one"]) == []
    [claimed] = make_lease_queue(redis_client, "w2").claim(5).jobs
    assert (claimed.id, claimed.attempt, claimed.key) == ("one", 1, Lane.BULK.queue)
    assert AnswerStore(redis_client, token="w2").write([answer(claimed)]) == set()
    assert client.wait("one", timeout_s=5).ok
    assert redis_client.exists(DEAD, DEAD_ANSWERS, DEAD_MESSAGES) == 0


def test_drop_deletes_the_letter_but_not_the_answer(client: Client, redis_client: redis.Redis) -> None:
    """The answer stays under its key, and the id still counts as answered."""
    write_dead_letter(redis_client, client, "one")
    assert client.drop(["one", "never-was"]) == 1
    assert client.dead_letter("one") is None
    assert client.answer("one") is not None


def test_dead_letters_are_limited_by_number_and_age(client: Client, redis_client: redis.Redis) -> None:
    """The oldest are dropped first and counted; maintenance removes those that are too old."""
    for number in range(8):
        write_dead_letter(redis_client, client, f"j{number}", dead_length=5)
    assert {letter.id for letter in client.dead_letters()} == {f"j{n}" for n in range(3, 8)}
    assert client.queue_state().counters["dead_dropped"] == 3
    redis_client.zadd(DEAD, {"j3": 1.0})
    make_maintenance(redis_client).run_once()
    assert {letter.id for letter in client.dead_letters()} == {f"j{n}" for n in range(4, 8)}
    assert redis_client.hlen(DEAD_ANSWERS) == redis_client.hlen(DEAD_MESSAGES) == 4


def test_cli_dead_lists_shows_requeues_and_drops(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    """With filters and dry run; a command without ids or filters does nothing."""
    for job_id in ("one", "two"):
        write_dead_letter(redis_client, client, job_id)

    def run(*args: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["--redis-url", redis_url, "dead", *args])
        assert result.exit_code == code, result.output
        return result.output

    assert "source_unavailable" in run("list")
    lines = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert [line["answer"]["error"]["stage"] for line in lines] == ["fetch", "fetch"]
    assert json.loads(run("show", "one"))["lane"] == "bulk"
    run("show", "nobody", code=1)
    run("requeue", code=2)
    run("drop", "one", "--all", code=2)
    assert sorted(run("requeue", "--all", "--dry-run").split()) == ["one", "two"]
    assert redis_client.llen(Lane.BULK.queue) == 0
    assert run("requeue", "--code", "source_unavailable", "--image", "one").split() == ["one"]
    assert run("drop", "--newer", "1h") == "dropped 1\n"
    assert redis_client.zcard(DEAD) == 0


def test_rejected_image_is_tagged_after_requeue(
    start_worker: StartWorker, redis_url: str, client: Client, redis_client: redis.Redis, http_server: PictureServer
) -> None:
    """A real worker: the image is missing first, and exists before the requeue."""
    url = http_server.serve("/late.png", Reply.error(404), Reply.picture(pictures.png(pictures.picture())))
    start_worker(redis_url=redis_url)
    client.enqueue(url, id="late")
    result = client.wait("late", timeout_s=30)
    assert result.error is not None
    assert result.error.code is ErrorCode.SOURCE_NOT_FOUND
    assert client.requeue(letter.id for letter in client.dead_letters()) == ["late"]
    assert client.wait("late", timeout_s=30).ok
    wait_until(lambda: redis_client.exists(result_key("late")), timeout_s=5)


def test_refused_message_of_10_mb_is_kept_as_digest_and_head(
    client: Client, redis_client: redis.Redis, redis_url: str
) -> None:
    """It would be refused again, so it cannot be requeued, and `requeue` says so."""
    raw = b'{"headers":{"id":"large|1","task":"shiwu.tag"},"body":"' + b"x" * 10_000_000 + b'"}'
    redis_client.lpush(Lane.BULK.queue, raw)
    [claimed] = make_lease_queue(redis_client, "w").claim(1).jobs
    job = open_job(claimed)
    assert job.error is not None
    AnswerStore(redis_client, token="w").write(to_entries([job], worker="w", now_s=time.monotonic()))
    [letter] = client.dead_letters()
    assert (letter.lane, letter.size, letter.sha256) == (Lane.BULK, len(raw), hashlib.sha256(raw).hexdigest())
    assert letter.message == raw[:HEAD_BYTES].replace(b"|", b"?")
    assert (redis_client.memory_usage(DEAD_MESSAGES, samples=0) or 0) < 10_000
    assert client.requeue([letter.id]) == []
    assert redis_client.llen(Lane.BULK.queue) == 0
    found = CliRunner().invoke(main, ["--redis-url", redis_url, "dead", "requeue", letter.id])
    assert (found.exit_code, "digest and head" in found.output) == (1, True)
    found = CliRunner().invoke(main, ["--redis-url", redis_url, "dead", "show", letter.id])
    assert json.loads(found.output)["message_bytes"] == len(raw)
