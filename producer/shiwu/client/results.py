"""Reads answers from Celery's result keys."""

from __future__ import annotations

from typing import Any

import msgspec

from shiwu.contract import Answer, ErrorCode, ErrorInfo, Status
from shiwu.errors import ForeignResult, JobFailed


class TagResult(Answer, frozen=True):
    """The answer of a job, as `Client` returns it: status, tags or error, and times. Immutable.

    Check `ok` first: `tags` is None where the job has no tags, and `error` is None where it has no error.
    """

    def __post_init__(self) -> None:
        """Convert known words to members of their enums."""
        self.recognise_words()

    @property
    def ok(self) -> bool:
        """Whether the status is `tagged`."""
        return self.status is Status.TAGGED

    @property
    def best(self) -> str | None:
        """The label with the highest score, or None where there are no tags."""
        return self.tags[0].label if self.tags else None

    def raise_for_status(self) -> TagResult:
        """Return this answer if its status is `tagged`.

        Raises:
            JobFailed: the job ended without tags; the text has the error code and the reason.
        """
        if self.ok:
            return self
        reason = f"{self.error.code}: {self.error.message}" if self.error else str(self.status)
        raise JobFailed(reason, self)


def read_result(raw: bytes) -> TagResult:
    """Read the value of a result key, in any of Celery's states.

    Raises:
        ForeignResult: it is the result of another task.
    """
    try:
        meta = msgspec.json.decode(raw, type=_Meta)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ForeignResult(f"expected a result in Celery's JSON form, got {raw[:80]!r} ({error})") from None
    result = meta.result
    if isinstance(result, dict):
        if isinstance(answer := result.get("answer", result), dict) and {"id", "status", "version"} <= answer.keys():
            return _read_fields(answer, job_id=meta.task_id)
        if answer_of_follower := _follower_answer(meta, result):
            return answer_of_follower
    raise ForeignResult(
        f"expected an answer of shiwu under the id {meta.task_id}, got the result of another Celery task in the state "
        f"{meta.status}; read it by that task's own AsyncResult"
    )


def read_answer(raw: bytes, *, job_id: str) -> TagResult:
    """Read an answer from JSON; one that this version cannot read becomes a result with `answer_unreadable`."""
    try:
        return TagResult.from_json(raw)
    except ValueError as error:
        return _unreadable(job_id, error)


def _read_fields(answer: dict[str, Any], *, job_id: str) -> TagResult:
    try:
        return msgspec.convert(answer, TagResult)
    except ValueError as error:
        return _unreadable(job_id, error)


def _unreadable(job_id: str, error: ValueError) -> TagResult:
    text = f"expected an answer that this version of the client can read ({error!s:.200}); upgrade the client"
    return TagResult(id=job_id, status=Status.FAILED, error=ErrorInfo(code=ErrorCode.ANSWER_UNREADABLE, message=text))


class _Meta(msgspec.Struct):
    """The fields that all of Celery's JSON results have."""

    status: str
    task_id: str
    result: Any = None


def _follower_answer(meta: _Meta, result: dict[str, Any]) -> TagResult | None:
    """The answer of a job that never ran because a job before it in its chain ended without tags."""
    message = result.get("exc_message")
    text = ", ".join(map(str, message)) if isinstance(message, list | tuple) else str(message)
    kind = (meta.status, result.get("exc_module"), result.get("exc_type"))
    if kind == ("REVOKED", "celery.exceptions", "TaskRevokedError"):
        status = Status.EXPIRED if text == Status.EXPIRED else Status.CANCELLED
        code = ErrorCode(status)
    elif kind == ("FAILURE", JobFailed.__module__, JobFailed.__name__):
        status, code = Status.FAILED, ErrorCode.CHAIN_FAILED
    else:
        return None
    error = ErrorInfo(code=code, message=f"a job before this one in its chain ended without tags: {text}")
    return TagResult(id=meta.task_id, status=status, attempts=0, error=error)
