"""What a producer may have to handle. Every error has a stable `code`."""

from __future__ import annotations

from typing import ClassVar

from shiwu.contract import Answer, RequestError


class ShiwuError(Exception):
    """Base of the errors below."""

    code: ClassVar[str] = "error"


class QueueFull(ShiwuError):
    """The lane holds its limit already; nothing of this call's last portion was enqueued."""

    code = "queue_full"


class WaitTimeout(ShiwuError, TimeoutError):
    """No answer came in time; the job goes on, and its answer can still be read later."""

    code = "wait_timeout"


class JobFailed(ShiwuError):
    """The job ended without tags. Celery rebuilds this error from its text, so `answer` may be missing."""

    code = "job_failed"

    def __init__(self, message: str = "", answer: Answer | None = None) -> None:
        super().__init__(message)
        self.answer = answer


__all__ = ["JobFailed", "QueueFull", "RequestError", "ShiwuError", "WaitTimeout"]
