"""A part that cannot be written ends the run with the reason."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import redis

from shiwu.backfill.collector import Collector
from shiwu.backfill.open_jobs import OpenJobs
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.state import BackfillState, Saved
from shiwu.client.results import TagResult, read_answer
from shiwu.contract import Answer, ErrorCode, ErrorInfo, Status
from shiwu.parts import Objects, TargetError, open_target
from shiwu.parts.targets import Target

JOBS = 5


def refused_job(job_id: str, *, message: str) -> TagResult:
    """The answer of a job that was refused."""
    error = ErrorInfo(code=ErrorCode.INVALID_REQUEST, message=message)
    return read_answer(Answer(id=job_id, status=Status.REJECTED, error=error).to_json(), job_id=job_id)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A folder whose files are on a full disk until they are staged."""
    full = tmp_path / "part"
    full.symlink_to("/dev/full")
    opened = open_target(str(tmp_path / "out"), objects=Objects({}), temporary=".t-")
    monkeypatch.setattr(opened, "local", lambda name: full)
    return opened


@pytest.fixture
def collector(target: Target) -> Collector:
    """A collector with open jobs, whose Redis is not asked."""
    plan, pace = (msgspec.json.encode(value).decode() for value in (Plan(source="-", out="out"), Pace()))
    open_jobs = OpenJobs()
    open_jobs.open((f"bf.n.{number}", "s3://b/k") for number in range(JOBS))
    return Collector(
        clients=[],
        acks=[],
        state=BackfillState(redis.Redis(), "n"),
        saved=Saved.from_fields({"plan": plan, "pace": pace, "phase": "running", "started_ms": "0"}),
        open_jobs=open_jobs,
        target=target,
        part_rows=10,
        token="t",
    )


@pytest.mark.parametrize("length", [1, 3_000, 1_000_000], ids=["at_close", "later", "at_once"])
def test_full_disk_names_the_part(collector: Collector, tmp_path: Path, length: int) -> None:
    """Also the end after the error, which gives the part up and removes its file."""

    def write_part() -> None:
        for number in range(JOBS):
            collector._add(refused_job(f"bf.n.{number}", message="x" * length))
        collector.record()

    with pytest.raises(TargetError, match=r"part: No space left on device"):
        write_part()
    collector.close()
    assert not (tmp_path / "part").is_symlink()
