"""Admission: decides whether a claimed job is loaded, and whether a failed job gets another attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec
import structlog

from shiwu.broker.message_reader import read_canvas
from shiwu.contract import ErrorCode, ErrorInfo, RequestError, Stage, without_query
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.label_set import LabelSet

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.label_vectors import EncodedLabels
    from shiwu_worker.loaders.protocol import LoadFailed
    from shiwu_worker.policy.callback_rules import CallbackRules
    from shiwu_worker.policy.retry import PipelineLimits
    from shiwu_worker.stages.score.label_bank import LabelBank

log: FilteringBoundLogger = structlog.get_logger()


class Admit(msgspec.Struct, frozen=True, gc=False):
    """Load the job; it is compared with this label set."""

    label_set: LabelSet
    labels: EncodedLabels | None = None
    """The label set with its vectors, or None while they are being computed."""


class Reject(msgspec.Struct, frozen=True, gc=False):
    """Do not load the job; it has this error."""

    error: ErrorInfo


class Defer(msgspec.Struct, frozen=True, gc=False):
    """Give the job back for this time, without counting an attempt."""

    delay_s: float


Decision: TypeAlias = Admit | Reject | Defer


class Admission:
    """Decides by the job and the operator's limits, and changes neither. Thread-safe.

    Args:
        label_bank: finds the label set that a request names.
        callback_rules: which Celery callbacks a message may carry.
    """

    def __init__(self, limits: PipelineLimits, *, label_bank: LabelBank, callback_rules: CallbackRules) -> None:
        self._limits = limits
        self._label_bank = label_bank
        self._callback_rules = callback_rules

    def check(self, job: Job, now_s: float) -> Decision:
        """Whether a job that was just claimed is loaded, answered with an error, or given back."""
        if (error := job.error or job.expiry(now_s) or self._eta_error(job, now_s)) is not None:
            return Reject(error)
        if job.has_callbacks and (error := self._callback_error(job)) is not None:
            return Reject(error)
        if job.due_s > now_s:
            return Defer(job.due_s - now_s)
        if job.deaths >= self._limits.max_attempts:
            text = f"given up: {job.deaths} workers died, hung or lost their device while they held it"
            return Reject(ErrorInfo(code=ErrorCode.ATTEMPTS_EXHAUSTED, message=text, stage=Stage.CLAIM))
        request = job.request
        try:
            return Admit(
                self._label_bank.resolve(request.labels if request else None, request.head if request else None)
            )
        except Rejected as rejected:
            return Reject(rejected.info())

    def next_attempt(self, job: Job, result: LoadFailed | None = None) -> Release | None:
        """The release of a failed job that gets another attempt; None where it is to be answered with its error.

        Args:
            result: what the loaders reported, where loading failed.
        """
        error = job.error
        if error is None or (result is not None and result.is_final):
            return None
        is_untried = result is not None and result.is_untried
        policy = self._limits.retries.get(error.code)
        if policy is None or (job.attempt >= policy.attempts and not is_untried):
            return None
        source_pause_s = (result.retry_after_s if result is not None else None) or 0.0
        delay_s = min(source_pause_s, self._limits.longest_pause_s) + policy.delay_s(job.attempt)
        log.info(
            "job_retried",
            id=job.log_id,
            attempt=job.attempt,
            image=without_query(job.request.image) if job.request else None,
            code=str(error.code),
            stage=str(error.stage) if error.stage else None,
            error=error.message,
            delay_s=round(delay_s, 3),
        )
        ending = f"{error.code}|{error.stage or ''}"
        return Release(job.id, delay_s=delay_s, counts=not is_untried, ending=ending, shard=job.shard)

    def _eta_error(self, job: Job, now_s: float) -> ErrorInfo | None:
        longest_s, left_s = self._limits.longest_eta_s, job.due_s - now_s
        if left_s <= longest_s:
            return None
        text = f"expected an eta within {longest_s:g} s, got one in {left_s:.0f} s"
        return ErrorInfo(code=ErrorCode.INVALID_REQUEST, message=text, stage=Stage.CLAIM)

    def _callback_error(self, job: Job) -> ErrorInfo | None:
        try:
            self._callback_rules.check(read_canvas(job.raw))
        except RequestError as error:
            return ErrorInfo(code=error.code, message=str(error), stage=Stage.CLAIM)
        except Exception as error:  # noqa: BLE001 border: a message that crashes its reader would end one worker after another
            text = f"expected callbacks that can be read, got some that fail with {type(error).__name__}"
            return ErrorInfo(code=ErrorCode.MALFORMED_MESSAGE, message=text, stage=Stage.CLAIM)
        return None
