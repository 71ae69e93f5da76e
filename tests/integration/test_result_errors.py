"""What a waiting caller gets for a job without tags, and for an id that belongs to another Celery task."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import redis

from shiwu import Client, ForeignResult
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import Answer, ErrorCode, ErrorInfo, Status, result_key
from tests.support.processes import clean_environment

CATCH = """
import sys
import shiwu
from celery import Celery

app = Celery("caller", broker=sys.argv[1], backend=sys.argv[1])
try:
    app.AsyncResult("job").get(timeout=10)
except shiwu.JobFailed as error:
    print(type(error).__module__, error)
"""
TAG_FAILED = {"exc_type": "JobFailed", "exc_module": "shiwu.errors", "exc_message": ["source_not_found: no such key"]}
REVOKED = {"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions", "exc_message": ["expired"]}
OTHERS = {"exc_type": "ValueError", "exc_module": "builtins", "exc_message": ["no"]}


def store(client: redis.Redis, status: str, result: Any) -> None:
    """A result as Celery's Redis backend stores it."""
    meta = {"status": status, "result": result, "traceback": None, "children": [], "task_id": "job"}
    client.set(result_key("job"), json.dumps(meta))


def test_celery_get_raises_job_failed_of_shiwu(redis_url: str, redis_client: redis.Redis) -> None:
    """In a process that has imported only `shiwu`; Celery looks for the class in loaded modules."""
    error = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="no such key")
    answer = Answer(id="job", status=Status.REJECTED, error=error)
    AnswerStore(redis_client, token="w").write([AnswerEntry(id="job", answer=answer)])
    command = [sys.executable, "-c", CATCH, redis_url]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "shiwu.errors source_not_found: no such key\n"), done.stderr


@pytest.mark.parametrize(
    ("status", "result", "expected"),
    [
        ("FAILURE", TAG_FAILED, (Status.FAILED, ErrorCode.CHAIN_FAILED)),
        ("REVOKED", REVOKED, (Status.EXPIRED, ErrorCode.EXPIRED)),
    ],
)
def test_task_after_a_failed_job_has_an_answer(
    redis_url: str, redis_client: redis.Redis, status: str, result: Any, expected: tuple[Status, ErrorCode]
) -> None:
    """The worker stores the error of the failed job for the next one, whose callers get it as their answer."""
    store(redis_client, status, result)
    with Client(redis_url) as client:
        for found in (client.answer("job"), client.wait("job", timeout_s=5)):
            assert found is not None
            assert found.error is not None
            assert (found.id, found.status, found.error.code) == ("job", *expected)
            assert result["exc_message"][0] in found.error.message


@pytest.mark.parametrize(
    ("status", "result"),
    [
        ("SUCCESS", 5),
        ("SUCCESS", None),
        ("SUCCESS", ["a"]),
        ("SUCCESS", {"id": "not ours"}),
        ("SUCCESS", {"answer": 42}),
        ("FAILURE", OTHERS),
        ("STARTED", {"pid": 1, "hostname": "h"}),
    ],
)
def test_result_of_another_task_raises_foreign_result(
    redis_url: str, redis_client: redis.Redis, status: str, result: Any
) -> None:
    """One error type for everything that another Celery task may store under the id."""
    store(redis_client, status, result)
    with Client(redis_url) as client:
        for ask in (lambda: client.answer("job"), lambda: client.wait("job", timeout_s=5)):
            with pytest.raises(ForeignResult, match="another Celery task"):
                ask()


def test_unreadable_result_raises_foreign_result(redis_url: str, redis_client: redis.Redis) -> None:
    """For example of an application with another serializer."""
    redis_client.set(result_key("job"), b"\x80\x04pickle")
    with Client(redis_url) as client, pytest.raises(ForeignResult, match="JSON"):
        client.answer("job")
