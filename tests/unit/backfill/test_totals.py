"""Counts of answers that add up over parts, and the limit of the rate."""

from __future__ import annotations

import pytest

from shiwu.backfill import feeder
from shiwu.backfill.feeder import RateLimit
from shiwu.backfill.open_jobs import OpenJobs
from shiwu.backfill.totals import Totals
from shiwu.contract import Answer, ErrorCode, ErrorInfo, LabelsInfo, ModelInfo, Status, Timing

MODEL = ModelInfo(id="clip", revision="1", dtype="float32", device="cpu")
LABELS = LabelsInfo(digest="abc", count=3, head="softmax")


def answer(status: Status, *, total_ms: float = 0.0, code: ErrorCode | None = None) -> Answer:
    """An answer with this status."""
    error = None if code is None else ErrorInfo(code=code, message="")
    return Answer(id="x", status=status, timing=Timing(total=total_ms), error=error, model=MODEL, labels=LABELS)


def test_totals_add_up() -> None:
    """Those of a state and those of the part after it."""
    first, second = Totals(), Totals()
    for _ in range(3):
        first.add(answer(Status.TAGGED))
    second.add(answer(Status.REJECTED, code=ErrorCode.SOURCE_NOT_FOUND))
    second.add(answer(Status.CANCELLED, code=ErrorCode.CANCELLED))
    fields = {name: str(count) for name, count in first.counts.items()} | {"read": "9", "cursor": "x"}
    totals = Totals.from_fields(fields).plus(second)
    assert (totals.answered, totals.failed) == (5, 1)
    assert totals.by("status") == {"tagged": 3, "cancelled": 1, "rejected": 1}
    summary = totals.summary()
    assert summary["by_code"] == {"cancelled": 1, "source_not_found": 1}
    assert (summary["models"], summary["labels"]) == ({"clip@1": 5}, {"abc": 5})
    assert summary["total_ms_p50"] is None


@pytest.mark.parametrize(("share", "expected_ms"), [(0.5, 50.0), (0.95, 95.0), (1.0, 100.0), (0.01, 1.0)])
def test_percentiles_are_right_to_five_percent(share: float, expected_ms: float) -> None:
    totals = Totals()
    for number in range(1, 101):
        totals.add(answer(Status.TAGGED, total_ms=float(number)))
    assert totals.percentile_ms(share) == pytest.approx(expected_ms, rel=0.06)


def test_rate_limit_saves_up_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(feeder.time, "monotonic", lambda: now_s[0])
    rate = RateLimit(50.0)
    assert rate.free(1000) == 1
    rate.sent(1)
    now_s[0] += 0.11
    assert rate.free(1000) == 5
    now_s[0] += 60
    assert rate.free(1000) == 50
    assert rate.free(3) == 3
    assert RateLimit(None).free(1000) == 1000


def test_slow_rate_lets_single_jobs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in ten seconds."""
    now_s = [0.0]
    monkeypatch.setattr(feeder.time, "monotonic", lambda: now_s[0])
    rate = RateLimit(0.1)
    rate.sent(rate.free(10))
    now_s[0] += 9.9
    assert rate.free(10) == 0
    now_s[0] += 0.2
    assert rate.free(10) == 1


def test_open_job_takes_one_answer() -> None:
    """A second one, and one of a job that is closed or never was open, is none of its."""
    jobs = OpenJobs()
    jobs.open([("a", "s3://b/a.jpg"), ("b", "s3://b/b.jpg")])
    assert [jobs.answer(job_id) for job_id in ("a", "a", "c")] == [True, False, False]
    assert (jobs.unanswered, list(jobs.without_answer())) == (1, ["b"])
    jobs.close(["a"])
    assert "a" not in jobs
    assert not jobs.answer("a")
    assert jobs.unanswered == 1
