"""Groups the settings into read-only values, one for each part of the worker that needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from shiwu.broker.retention import Retention
from shiwu.contract import RETRIED, ErrorCode
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy

if TYPE_CHECKING:
    from shiwu_worker.config.settings import Settings

LABEL_SET_ATTEMPTS: Final = 4
"""Claims of a job whose label set is unknown. It is released three times, because another worker may know the set."""


def retention(settings: Settings) -> Retention:
    """How much is kept and for how long."""
    return Retention(
        result_ttl_s=settings.result_ttl_s,
        done_ttl_s=max(settings.done_ttl_s, settings.result_ttl_s),
        dead_length=settings.dead_length,
        dead_age_s=settings.dead_ttl_s,
        stream_length=settings.stream_length,
    )


def pipeline_limits(settings: Settings) -> PipelineLimits:
    """What the pipeline may hold, and when it gives a job up."""
    usual = RetryPolicy(settings.max_attempts, settings.retry_first_s, settings.retry_longest_s)
    retries: dict[str, RetryPolicy] = dict.fromkeys(RETRIED, usual)
    retries[ErrorCode.UNKNOWN_LABEL_SET] = replace(usual, attempts=LABEL_SET_ATTEMPTS)
    retries |= {code: RetryPolicy(*policy) for code, policy in settings.retry.items()}
    return PipelineLimits(
        slots=settings.slot_count,
        max_attempts=settings.max_attempts,
        retries=retries,
        longest_pause_s=settings.retry_after_longest_s,
        zone=settings.zone,
    )
