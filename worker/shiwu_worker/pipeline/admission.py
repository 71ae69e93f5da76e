"""What becomes of a job that can't simply go on: refused at its claim, or given another try when it has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from shiwu.contract import ErrorCode, ErrorInfo, RequestError, Stage, without_query
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.job import Job, Release

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.policy.retry import PipelineLimits

log: Any = structlog.get_logger()


class Admission:
    """Decides by what a job carries with it and by the operator's limits; carries nothing out.

    Args:
        resolve: a job's label set; raises Rejected where it names none that is known.
        judge_callbacks: of a job that has some; raises RequestError where the operator did not allow them.
    """

    def __init__(
        self, limits: PipelineLimits, resolve: Callable[[Job], LabelSet], *, check_callbacks: Callable[[Job], None]
    ) -> None:
        self._limits = limits
        self._resolve = resolve
        self._check_callbacks = check_callbacks

    def admits(self, job: Job, now_s: float) -> bool:
        """Whether a claimed job is to be loaded; else it has its error, or the way back that it takes."""
        if job.back is not None or job.error is not None or job.unwanted(now_s):
            return False
        if job.has_callbacks and not self._admits_callbacks(job):
            return False
        if job.due_s > now_s:
            job.back = Release(job.id, delay_s=job.due_s - now_s)
            return False
        if job.deaths >= self._limits.max_attempts:
            text = f"given up: {job.deaths} workers died, hung or lost their device while they held it"
            job.fail(ErrorInfo(code=ErrorCode.ATTEMPTS_EXHAUSTED, message=text, stage=Stage.CLAIM))
            return False
        try:
            job.label_set = self._resolve(job)
        except Rejected as error:
            job.fail(error.info())
            return False
        return True

    def _admits_callbacks(self, job: Job) -> bool:
        try:
            self._check_callbacks(job)
        except RequestError as error:
            job.fail(ErrorInfo(code=error.code, message=str(error), stage=Stage.CLAIM))
        except Exception as error:  # noqa: BLE001 border: a message that ends its reader would end one worker after another
            text = f"expected callbacks that can be read, got some that fail with {type(error).__name__}"
            job.fail(ErrorInfo(code=ErrorCode.MALFORMED_MESSAGE, message=text, stage=Stage.CLAIM))
        return job.error is None

    def spare(self, job: Job) -> None:
        """Give a failed job another try where its class of error has one left."""
        policy = self._limits.retries.get(job.error.code) if job.error is not None else None
        if policy is None or job.error is None or job.is_final:
            return
        if job.is_untried or job.attempt < policy.attempts:
            asked_s = min(job.retry_after_s or 0.0, self._limits.longest_pause_s)
            delay_s = asked_s + policy.delay_s(job.attempt)
            ending = f"{job.error.code}|{job.error.stage or ''}"
            job.back = Release(job.id, delay_s=delay_s, counts=not job.is_untried, ending=ending)
            log.info(
                "job_retried",
                id=job.log_id,
                attempt=job.attempt,
                image=without_query(job.request.image) if job.request else None,
                code=str(job.error.code),
                stage=str(job.error.stage) if job.error.stage else None,
                error=job.error.message,
                delay_s=round(delay_s, 3),
            )
