"""Answers of a made-up next version of the worker, read by this client: workers are upgraded before their consumers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from shiwu import JobFailed, UnreadableItem
from shiwu.cli import main
from shiwu.contract import (
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    RESULT_STREAM,
    Answer,
    ErrorCode,
    Lane,
    Stage,
    Status,
    WarningCode,
    result_key,
)
from tests.support.both_clients import OpenClient

NEXT: dict[str, Any] = {
    "version": 2,
    "id": "next",
    "status": "deferred",
    "lane": "nightly",
    "error": {"code": "quota_exceeded", "message": "no more today", "stage": "weigh", "retryable": True, "quota": 7},
    "warnings": [{"code": "model_retired", "message": "soon", "since": "2027"}],
    "labels": {"digest": "d", "count": 1, "head": "sparsemax", "language": "zh"},
    "timing": {"queue": 1.0, "weigh": 2.0, "total": 3.0},
    "image": {"reference": "s3://b/k", "format": "JXL", "depth": 10},
    "region": {"name": "new"},
}
KNOWN = Answer(id="known", status=Status.TAGGED, attempts=1)
UNREADABLE = [
    {b"answer": b"not json"},
    {b"answer": json.dumps(NEXT | {"attempts": "three"}).encode()},
    {b"something": b"else"},
]


def store(client: redis.Redis, answer: dict[str, Any], *, state: str = "FAILURE") -> None:
    """Store an answer as Celery's result of a failed task, in the way a worker does."""
    result = {
        "exc_type": "JobFailed",
        "exc_message": ["quota_exceeded"],
        "exc_module": "shiwu.errors",
        "answer": answer,
    }
    meta = {"status": state, "result": result, "traceback": None, "children": [], "task_id": answer["id"]}
    client.set(result_key(answer["id"]), json.dumps(meta))


def test_unknown_words_of_an_answer_are_strings(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """`wait`, `answer` and `raise_for_status` pass unknown words on."""
    store(redis_client, NEXT)
    with open_client(redis_url) as client:
        for result in (client.wait("next", timeout_s=5), client.answer("next")):
            assert result is not None
            assert result.error is not None
            assert result.warnings is not None
            assert result.labels is not None
            words = (result.status, result.lane, result.error.code, result.error.stage, result.warnings[0].code)
            assert words == ("deferred", "nightly", "quota_exceeded", "weigh", "model_retired")
            assert {type(word) for word in words} == {str}
            assert (result.labels.head, result.ok, result.version) == ("sparsemax", False, 2)
            with pytest.raises(JobFailed, match="quota_exceeded: no more today"):
                result.raise_for_status()


def test_known_words_of_an_answer_are_enum_members() -> None:
    """Comparisons by identity and `.value` go on working."""
    raw = json.dumps(
        NEXT
        | {"status": "failed", "lane": "bulk", "warnings": [{"code": "single_label", "message": ""}]}
        | {"error": {"code": "source_throttled", "message": "", "stage": "fetch"}}
    )
    read = Answer.from_json(raw.encode())
    assert read.error is not None
    assert read.warnings is not None
    assert read.status is Status.FAILED
    assert read.lane is Lane.BULK
    assert read.error.code is ErrorCode.SOURCE_THROTTLED
    assert read.error.stage is Stage.FETCH
    assert read.warnings[0].code is WarningCode.SINGLE_LABEL
    assert Answer.from_json(read.to_json()) == read


def test_wait_for_unreadable_answer_gives_an_error_code(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """A field with another type: the caller gets a result with an error code, and no decoding error."""
    store(redis_client, NEXT | {"attempts": "three"})
    with open_client(redis_url) as client:
        result = client.wait("next", timeout_s=5)
        assert result.error is not None
        assert (result.id, result.status, result.error.code) == ("next", Status.FAILED, ErrorCode.ANSWER_UNREADABLE)
        assert "attempts" in result.error.message


def test_unreadable_items_are_skipped_and_counted(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """The loop goes on, each entry is reported once, and the group gets them again after an upgrade."""
    for fields in (*UNREADABLE, {b"id": b"next", b"answer": json.dumps(NEXT).encode()}):
        redis_client.xadd(RESULT_STREAM, fields)  # type: ignore[arg-type]  # redis' own
    redis_client.xadd(RESULT_STREAM, {"id": "known", "answer": KNOWN.to_json()})
    reported: list[UnreadableItem] = []
    with open_client(redis_url) as client:

        def read() -> list[str]:
            items = client.results(
                group="g", block_s=0.05, reclaim_idle_s=0.0, stop_when_idle=True, on_unreadable=reported.append
            )
            seen = []
            for item in items:
                seen.append(item.result.id)
                item.ack()
            return seen

        assert read() == ["next", "known"]
        assert len(reported) == client.unreadable_items == len(UNREADABLE)
        assert read() == []
        pending: Any = redis_client.xpending(RESULT_STREAM, "g")
        assert pending["pending"] == len(UNREADABLE)
        for item in reported:
            item.ack()
        pending = redis_client.xpending(RESULT_STREAM, "g")
        assert pending["pending"] == 0


def test_cli_results_reports_skipped_entries(redis_url: str, redis_client: redis.Redis) -> None:
    """One line on standard error for each, and the readable ones as JSON lines."""
    redis_client.xadd(RESULT_STREAM, {"answer": "not json"})
    redis_client.xadd(RESULT_STREAM, {"id": "known", "answer": KNOWN.to_json()})
    done = CliRunner().invoke(main, ["--redis-url", redis_url, "results"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["id"] == "known"
    assert "was skipped and stays pending" in done.stderr


def test_dead_letters_of_a_newer_worker_are_listed(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """With an unknown code, and with an answer that cannot be read: neither hides its letter or its neighbours."""
    for number, answer in enumerate((json.dumps(NEXT), "not json")):
        redis_client.zadd(DEAD, {f"job-{number}": 1.0})
        redis_client.hset(DEAD_ANSWERS, f"job-{number}", answer)
        redis_client.hset(DEAD_MESSAGES, f"job-{number}", "shiwu.bulk|{}")
    with open_client(redis_url) as client:
        found = {letter.id: letter.result.error.code for letter in client.dead_letters() if letter.result.error}
    assert found == {"job-0": "quota_exceeded", "job-1": ErrorCode.ANSWER_UNREADABLE}
    shown = CliRunner().invoke(main, ["--redis-url", redis_url, "dead", "list"])
    assert shown.exit_code == 0, shown.output
    assert "quota_exceeded" in shown.output
