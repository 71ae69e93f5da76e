"""Answers as they lie under their keys."""

from __future__ import annotations

from typing import Any

import msgspec

from shiwu.contract import Answer, ErrorCode, ErrorInfo, Status
from shiwu.errors import ForeignResult, JobFailed


class TagResult(Answer, frozen=True):
    """An answer with the questions that one usually asks of it."""

    def __post_init__(self) -> None:
        """Recognise known words in what was read."""
        self.recognise_words()

    @property
    def ok(self) -> bool:
        """Whether the picture was tagged."""
        return self.status is Status.TAGGED

    @property
    def best(self) -> str | None:
        """The best label, or None."""
        return self.tags[0].label if self.tags else None

    def raise_for_status(self) -> TagResult:
        """Return itself when the picture was tagged, else raise JobFailed with the code and the reason."""
        if self.ok:
            return self
        why = f"{self.error.code}: {self.error.message}" if self.error else str(self.status)
        raise JobFailed(why, self)


def read_result(raw: bytes) -> TagResult:
    """Read what lies under a result key, whichever of Celery's states it has.

    Raises:
        ForeignResult: shiwu did not write it.
    """
    try:
        meta = msgspec.json.decode(raw, type=_Meta)
    except msgspec.MsgspecError as error:
        raise ForeignResult(f"expected a result in Celery's JSON form, got {raw[:80]!r} ({error})") from None
    result = meta.result
    if isinstance(result, dict):
        if isinstance(answer := result.get("answer", result), dict) and {"id", "status", "version"} <= answer.keys():
            return _read_fields(answer, job_id=meta.task_id)
        if follower := _follower(meta, result):
            return follower
    raise ForeignResult(
        f"expected an answer of shiwu under the id {meta.task_id}, got the result of another Celery task in the state "
        f"{meta.status}; read it by that task's own AsyncResult"
    )


def read_answer(raw: bytes, *, job_id: str) -> TagResult:
    """Read an answer as JSON; one that this version cannot read gives a result with the code `answer_unreadable`."""
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
    """What Celery's JSON results have in common."""

    status: str
    task_id: str
    result: Any = None


def _follower(meta: _Meta, result: dict[str, Any]) -> TagResult | None:
    """The answer of a job that never ran because a job before it in its chain ended without tags."""
    said = result.get("exc_message")
    text = ", ".join(map(str, said)) if isinstance(said, list | tuple) else str(said)
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
