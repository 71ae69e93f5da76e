"""Which jobs are loaded, and when a failed job gets another attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.broker.message_writer import build_message
from shiwu.contract import ErrorCode, ErrorInfo, Lane, Request, parse_request
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.loaders.protocol import LoadFailed
from shiwu_worker.pipeline.admission import Admission, Admit, Defer, Reject
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy

LABELS = LabelSet("known", ("a", "b"))
POLICY = RetryPolicy(attempts=3, first_s=2.0, longest_s=60.0)
NOW_S = 100.0


class Labels:
    """A label bank that knows one set."""

    def resolve(self, labels: Any, _head: Any = None) -> LabelSet:
        """The set, or the error of a name that is unknown."""
        if labels == "known":
            return LABELS
        raise Rejected(ErrorCode.UNKNOWN_LABEL_SET, "no such label set")


@pytest.fixture
def admission() -> Admission:
    """With three worker deaths at most, and retries of throttled sources."""
    limits = PipelineLimits(
        slots=8, max_attempts=3, retries={ErrorCode.SOURCE_THROTTLED: POLICY}, longest_pause_s=300.0
    )
    labels: Any = Labels()
    return Admission(limits, label_bank=labels, callback_rules=CallbackRules())


def make_job(*, labels: str = "known", **fields: Any) -> Job:
    """A claimed job."""
    request = parse_request({"image": "s3://b/k", "labels": labels})
    moments = StageTimestamps(claimed_s=0.0)
    return Job(
        **({"id": "a", "key": "shiwu.bulk", "attempt": 1, "raw": b"", "request": request} | fields), moments=moments
    )


def test_job_without_an_obstacle_is_admitted(admission: Admission) -> None:
    """With the label set that its request names."""
    assert admission.check(make_job(expires_s=NOW_S + 1), NOW_S) == Admit(LABELS)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"expires_s": NOW_S}, ErrorCode.EXPIRED),
        ({"deaths": 3}, ErrorCode.ATTEMPTS_EXHAUSTED),
        ({"due_s": NOW_S + 8 * 86_400}, ErrorCode.INVALID_REQUEST),
        ({"labels": "unknown"}, ErrorCode.UNKNOWN_LABEL_SET),
        ({"has_callbacks": True, "raw": b"no message"}, ErrorCode.MALFORMED_MESSAGE),
        ({"error": ErrorInfo(code=ErrorCode.CANCELLED, message="revoked")}, ErrorCode.CANCELLED),
    ],
)
def test_obstacle_rejects_and_leaves_the_job_unchanged(
    admission: Admission, fields: dict[str, Any], code: ErrorCode
) -> None:
    """A check decides, and changes nothing of the job."""
    job = make_job(**fields)
    before = job.error, job.status, job.label_set
    decision = admission.check(job, NOW_S)
    assert isinstance(decision, Reject)
    assert decision.error.code is code
    assert (job.error, job.status, job.label_set) == before


def test_callbacks_that_crash_their_reader_reject_the_job() -> None:
    """Otherwise the message would end one worker after another."""

    def check(_: Any) -> None:
        raise IndexError("a defect")

    labels: Any = Labels()
    rules: Any = SimpleNamespace(check=check)
    limits = PipelineLimits(slots=8, max_attempts=3)
    raw = build_message(Request(image="s3://b/k"), job_id="a", lane=Lane.BULK)
    decision = Admission(limits, label_bank=labels, callback_rules=rules).check(
        make_job(has_callbacks=True, raw=raw), NOW_S
    )
    assert isinstance(decision, Reject)
    assert decision.error.code is ErrorCode.MALFORMED_MESSAGE
    assert "fail with IndexError" in decision.error.message


def test_countdown_defers_the_job(admission: Admission) -> None:
    """Until its time, and not where it has expired before."""
    assert admission.check(make_job(due_s=NOW_S + 5), NOW_S) == Defer(5.0)
    assert isinstance(admission.check(make_job(due_s=NOW_S + 5, expires_s=NOW_S - 1), NOW_S), Reject)


@pytest.mark.parametrize(
    ("attempt", "retry_after_s", "is_untried", "min_delay_s"),
    [(1, 20.0, False, 20.0), (2, 1e9, False, 300.0), (3, 20.0, True, 20.0), (1, None, False, 0.0)],
)
def test_failed_job_waits_for_the_pause_of_its_source(
    admission: Admission, attempt: int, retry_after_s: float | None, is_untried: bool, min_delay_s: float
) -> None:
    """At least that pause, up to the longest one. A job whose source was not asked keeps its attempts."""
    release = admission.next_attempt(failed(attempt), make_result(retry_after_s=retry_after_s, is_untried=is_untried))
    assert release is not None
    assert min_delay_s < release.delay_s <= min_delay_s + 8.0
    assert release.counts is not is_untried


def test_job_without_attempts_left_is_answered(admission: Admission) -> None:
    """Also where the error is final, or of a class that is not retried."""
    assert admission.next_attempt(failed(3), make_result(retry_after_s=20.0)) is None
    assert admission.next_attempt(failed(1), make_result(is_final=True)) is None
    broken = make_job()
    broken.fail(ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut"))
    assert admission.next_attempt(broken) is None


def failed(attempt: int) -> Job:
    """A job whose source asked for a pause."""
    job = make_job(attempt=attempt)
    job.fail(ErrorInfo(code=ErrorCode.SOURCE_THROTTLED, message="busy"))
    return job


def make_result(**fields: Any) -> LoadFailed:
    """What the loaders report of such a job."""
    error = ErrorInfo(code=ErrorCode.SOURCE_THROTTLED, message="busy")
    return LoadFailed(ticket=1, slot=0, started_s=0.0, fetched_s=0.0, decoded_s=0.0, error=error, **fields)


@pytest.mark.parametrize(("due_in_s", "is_refused"), [(86_399.0, False), (86_401.0, True)])
def test_eta_counts_from_now(*, due_in_s: float, is_refused: bool) -> None:
    """Not from the start of this machine, which may be long ago."""
    labels: Any = Labels()
    limits = PipelineLimits(slots=8, max_attempts=3, longest_eta_s=86_400.0)
    admission = Admission(limits, label_bank=labels, callback_rules=CallbackRules())
    decision = admission.check(make_job(due_s=NOW_S + due_in_s), NOW_S)
    if is_refused:
        assert isinstance(decision, Reject)
        assert decision.error.message == "expected an eta within 86400 s, got one in 86401 s"
    else:
        assert decision == Defer(due_in_s)
