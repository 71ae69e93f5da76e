"""When a failed job is given back, and for how long."""

from __future__ import annotations

import pytest

from shiwu.contract import ErrorCode, ErrorInfo
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.pipeline.admission import Admission
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy


def failed(attempt: int, *, retry_after_s: float | None, is_untried: bool = False) -> Job:
    """A job whose source asked for a pause."""
    job = Job(id="a", key="shiwu.bulk", attempt=attempt, raw=b"", moments=StageTimestamps(claimed_s=0.0))
    job.fail(ErrorInfo(code=ErrorCode.SOURCE_THROTTLED, message="busy"))
    job.retry_after_s, job.is_untried = retry_after_s, is_untried
    return job


def test_a_job_comes_back_after_the_pause_that_its_source_asks_for() -> None:
    """At least, and at most after the longest one; a job that did not ask keeps its attempts."""
    policy = RetryPolicy(attempts=3, first_s=2.0, longest_s=60.0)
    limits = PipelineLimits(
        slots=8, max_attempts=3, retries={ErrorCode.SOURCE_THROTTLED: policy}, longest_pause_s=300.0
    )
    admission = Admission(limits, pytest.fail, check_callbacks=pytest.fail)
    for job, least_s, counts in (
        (failed(1, retry_after_s=20.0), 20.0, True),
        (failed(2, retry_after_s=1e9), 300.0, True),
        (failed(3, retry_after_s=20.0, is_untried=True), 20.0, False),
        (failed(1, retry_after_s=None), 0.0, True),
    ):
        admission.spare(job)
        assert job.back is not None
        assert least_s < job.back.delay_s <= least_s + 8.0
        assert job.back.counts is counts
    last = failed(3, retry_after_s=20.0)
    admission.spare(last)
    assert last.back is None
