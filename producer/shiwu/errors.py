"""Exceptions of the client, each with a stable `code`. Errors of Redis itself are `redis.RedisError`.

`import shiwu` loads this module, so it imports nothing that takes time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from shiwu.contract import Answer, RequestError


class ShiwuError(Exception):
    """Base class of shiwu's own errors. `code` is a stable word for programs; the text is for people."""

    code: ClassVar[str] = "error"


class RedisUrlError(ShiwuError, ValueError):
    """The Redis URL is invalid.

    The text says what was expected. It does not quote the URL, which may contain a password.
    """

    code = "invalid_redis_url"


class QueueFull(ShiwuError):
    """The lane already holds its limit of messages.

    Nothing of the last portion was enqueued: for `enqueue` that is the job, for `enqueue_many` the images whose ids
    were not yielded. Try again later, pass `wait_s` to `enqueue_many`, or raise `max_waiting`.
    """

    code = "queue_full"


class WaitTimeout(ShiwuError, TimeoutError):
    """No answer came within `timeout_s`. The job goes on; wait again, or read its answer later with `Client.answer`."""

    code = "wait_timeout"


class ForeignResult(ShiwuError):
    """The result under this id is not an answer of shiwu: another Celery task has the same id."""

    code = "foreign_result"


class JobFailed(ShiwuError):
    """The job ended without tags. The text is `<error code>: <message>`.

    `answer` has the whole answer with status, error, attempts and times. It is None where Celery's
    `AsyncResult.get()` raises the error, because Celery rebuilds it from the text.
    """

    code = "job_failed"

    def __init__(self, message: str = "", answer: Answer | None = None) -> None:
        super().__init__(message)
        self.answer = answer


__all__ = ["ForeignResult", "JobFailed", "QueueFull", "RedisUrlError", "RequestError", "ShiwuError", "WaitTimeout"]


def __getattr__(name: str) -> Any:
    if name == "RequestError":
        from shiwu.contract import RequestError  # noqa: PLC0415 the contract takes a quarter of a second to import

        return RequestError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
