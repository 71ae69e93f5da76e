"""What a client makes of the values of result keys."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shiwu import ForeignResult, JobFailed, TagResult
from shiwu.client.results import read_answer, read_result
from shiwu.contract import Answer, ErrorCode, ErrorInfo, Status, Tag


def meta(result: Any, *, status: str = "SUCCESS") -> bytes:
    """A result as Celery writes it."""
    return json.dumps({"status": status, "task_id": "a", "result": result}).encode()


def fields(answer: Answer) -> dict[str, Any]:
    """An answer as a part of a result."""
    found: dict[str, Any] = json.loads(answer.to_json())
    return found


def failure(kind: str, module: str, message: Any) -> dict[str, Any]:
    """An exception as Celery writes it."""
    return {"exc_type": kind, "exc_module": module, "exc_message": message}


def test_best_is_the_first_label_or_none() -> None:
    """An answer without tags has none."""
    tags = (Tag(label="a", score=0.9, cosine=0.3), Tag(label="b", score=0.1, cosine=0.2))
    tagged = TagResult(id="x", status=Status.TAGGED, tags=tags)
    assert (tagged.best, tagged.ok, tagged.raise_for_status()) == ("a", True, tagged)
    assert TagResult(id="x", status=Status.TAGGED, tags=()).best is None
    failed = TagResult(id="x", status=Status.FAILED)
    assert (failed.best, failed.ok) == (None, False)


def test_failed_answer_raises_with_its_reason() -> None:
    """Code and text of the error, or the status where there is none."""
    error = ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut")
    with pytest.raises(JobFailed, match="picture_broken: cut") as caught:
        TagResult(id="x", status=Status.REJECTED, error=error).raise_for_status()
    assert caught.value.args[0] == "picture_broken: cut"
    with pytest.raises(JobFailed, match="expired"):
        TagResult(id="x", status=Status.EXPIRED).raise_for_status()


@pytest.mark.parametrize("is_nested", [False, True])
def test_answer_is_read_from_a_result(*, is_nested: bool) -> None:
    """The result itself, or a part of the failure that carries it."""
    written = fields(Answer(id="a", status=Status.TAGGED, attempts=2))
    found = read_result(meta({"answer": written} if is_nested else written))
    assert (found.id, found.status, found.attempts) == ("a", Status.TAGGED, 2)


@pytest.mark.parametrize(
    ("result", "status", "found"),
    [
        (failure("TaskRevokedError", "celery.exceptions", ["expired"]), "REVOKED", (Status.EXPIRED, ErrorCode.EXPIRED)),
        (failure("TaskRevokedError", "celery.exceptions", "gone"), "REVOKED", (Status.CANCELLED, ErrorCode.CANCELLED)),
        (failure("JobFailed", "shiwu.errors", ["x: y"]), "FAILURE", (Status.FAILED, ErrorCode.CHAIN_FAILED)),
    ],
)
def test_follower_of_a_failed_chain_has_an_answer(
    result: dict[str, Any], status: str, found: tuple[Status, ErrorCode]
) -> None:
    """It never ran, so it has no attempts; the text names what came before."""
    answer = read_result(meta(result, status=status))
    assert answer.error is not None
    assert (answer.id, answer.attempts, answer.status, answer.error.code) == ("a", 0, *found)


@pytest.mark.parametrize(
    "raw",
    [
        b"no JSON",
        meta(5),
        meta({"id": "a"}),
        meta(failure("ValueError", "builtins", "x"), status="FAILURE"),
        meta(failure("JobFailed", "shiwu.errors", "x"), status="SUCCESS"),
    ],
)
def test_result_of_another_task_is_foreign(raw: bytes) -> None:
    """It is not taken for an answer."""
    with pytest.raises(ForeignResult):
        read_result(raw)


def test_json_that_is_nested_too_deep_is_no_answer() -> None:
    """Another program may have written it; no reader may fail on it."""
    nested = b"[" * 100_000
    with pytest.raises(ForeignResult, match="recursion"):
        read_result(b'{"status":"SUCCESS","task_id":"a","result":' + nested)
    with pytest.raises(ValueError, match="fewer levels"):
        TagResult.from_json(b'{"id":"a","status":"tagged","metadata":' + nested)
    unreadable = read_answer(b'{"id":"a","status":"tagged","metadata":' + nested, job_id="a")
    assert unreadable.error is not None
    assert unreadable.error.code is ErrorCode.ANSWER_UNREADABLE


def test_unreadable_answer_has_an_error_code() -> None:
    """Of a newer version, say: the caller gets an answer of this id."""
    for answer in (
        read_answer(b'{"id": 5}', job_id="a"),
        read_result(meta({"id": 5, "status": "tagged", "version": 1})),
    ):
        assert answer.error is not None
        assert (answer.id, answer.status, answer.error.code) == ("a", Status.FAILED, ErrorCode.ANSWER_UNREADABLE)
        assert "upgrade the client" in answer.error.message
