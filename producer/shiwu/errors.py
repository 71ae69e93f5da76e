"""What a producer may have to handle. Every error has a stable `code`.

`import shiwu` loads this module, so it imports nothing that takes time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from shiwu.contract import Answer, RequestError


class ShiwuError(Exception):
    """Base of the errors below."""

    code: ClassVar[str] = "error"


class RedisUrlError(ShiwuError, ValueError):
    """The Redis URL cannot work. The text says what was expected, and never repeats the URL."""

    code = "invalid_redis_url"


class QueueFull(ShiwuError):
    """The lane holds its limit already; nothing of this call's last portion was enqueued."""

    code = "queue_full"


class WaitTimeout(ShiwuError, TimeoutError):
    """No answer came in time; the job goes on, and its answer can still be read later."""

    code = "wait_timeout"


class ForeignResult(ShiwuError):
    """The result under this id was not written by shiwu: another Celery task has the id."""

    code = "foreign_result"


class JobFailed(ShiwuError):
    """The job ended without tags. Celery rebuilds this error from its text, so `answer` may be missing."""

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
