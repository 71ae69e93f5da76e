"""Metrics: what is counted for which job, in batches, and what it costs."""

from __future__ import annotations

import math
import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import RETRIABLE, Answer, ErrorCode, ErrorInfo, Lane, ModelInfo, Stage, Status, Timing
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.outcome import CommittedJob, Released
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.runtime.progress import LoadReport
from shiwu_worker.telemetry.gpu_monitor import GpuMonitor, GpuState
from shiwu_worker.telemetry.histograms import BatchHistogram
from shiwu_worker.telemetry.metrics import Metrics
from tests.support.promtool import NEEDS_PROMTOOL, check_metrics
from tests.support.snapshots import make_snapshot

JOB = Job(id="j", key=Lane.BULK.queue, attempt=1, raw=b"", moments=StageTimestamps(claimed_s=0.0))
TIMES = Timing(queue=100.0, claim=1.0, fetch=20.0, decode=5.0, batch=2.0, encode=50.0, score=0.5, total=178.5)


def settled(
    *, lane: Lane = Lane.BULK, is_first: bool = True, code: ErrorCode | None = None, **fields: Any
) -> CommittedJob:
    """An answered job."""
    error = None if code is None else ErrorInfo(code=code, message="m")
    status = Status.TAGGED if code is None else Status.REJECTED
    answer = Answer(**{"id": "j", "status": status, "lane": lane, "timing": TIMES, "error": error} | fields)
    return CommittedJob(JOB, AnswerEntry(answer=answer, id="j"), 0.002, is_first)


def samples(metrics: Metrics) -> dict[str, float]:
    """Return each sample of the exported text with its value."""
    lines = metrics.text().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_answers_are_counted_by_lane_status_and_code() -> None:
    """Counts all answers of one commit; no text of a message becomes a label value."""
    metrics = Metrics(retried=RETRIABLE)
    refused = settled(lane=Lane.INTERACTIVE, code=ErrorCode.SOURCE_FORBIDDEN)
    metrics.answered([settled(), settled(is_first=False), refused])
    metrics.answered([])
    values = samples(metrics)
    assert values['shiwu_jobs_total{code="",lane="bulk",status="tagged"}'] == 2
    assert values['shiwu_jobs_total{code="source_forbidden",lane="interactive",status="rejected"}'] == 1
    assert values["shiwu_answers_discarded_total"] == 1


def test_every_stage_has_its_seconds() -> None:
    """Seven stages; queue wait and total by lane."""
    metrics = Metrics(retried=RETRIABLE)
    metrics.answered([settled(), settled()])
    values = samples(metrics)
    sums = {stage: values[f'shiwu_stage_seconds_sum{{stage="{stage.value}"}}'] for stage in Stage}
    assert sums == pytest.approx(
        {
            Stage.CLAIM: 0.002,
            Stage.FETCH: 0.04,
            Stage.DECODE: 0.01,
            Stage.BATCH: 0.004,
            Stage.ENCODE: 0.1,
            Stage.SCORE: 0.001,
            Stage.COMMIT: 0.004,
        }
    )
    assert values['shiwu_stage_seconds_bucket{le="0.025",stage="fetch"}'] == 2
    assert values['shiwu_stage_seconds_bucket{le="0.01",stage="fetch"}'] == 0
    assert values['shiwu_queue_wait_seconds_sum{lane="bulk"}'] == pytest.approx(0.2)
    assert values['shiwu_answer_seconds_sum{lane="bulk"}'] == pytest.approx(2 * 0.1805)
    assert values['shiwu_answer_seconds_count{lane="interactive"}'] == 0


def test_stage_that_a_job_did_not_reach_is_not_counted() -> None:
    """A stage that was not reached, an unknown wait and a missing lane are not counted."""
    metrics = Metrics(retried=RETRIABLE)
    metrics.answered([settled(lane=None, timing=Timing(claim=1.0, total=1.0), code=ErrorCode.SOURCE_FORBIDDEN)])  # type: ignore[arg-type]  # as answers from other processes' messages are
    values = samples(metrics)
    assert values['shiwu_stage_seconds_count{stage="claim"}'] == 1
    assert values['shiwu_stage_seconds_count{stage="encode"}'] == 0
    assert (
        values['shiwu_queue_wait_seconds_count{lane="bulk"}'] == values['shiwu_answer_seconds_count{lane="bulk"}'] == 0
    )


def test_series_exist_before_their_first_event() -> None:
    """So that "no answers" is the number 0, and the first retry is visible as an increase."""
    values = samples(Metrics(retried=RETRIABLE))
    assert values['shiwu_jobs_total{code="",lane="interactive",status="tagged"}'] == 0
    assert {name for name in values if name.startswith("shiwu_retries_total")} == {
        f'shiwu_retries_total{{code="{code.value}"}}' for code in RETRIABLE
    }


def test_metrics_of_all_other_parts_are_exported() -> None:
    """Retries, leases, batches, limits, lanes, the GPU and the model."""
    metrics = Metrics(retried=RETRIABLE)
    again = Job(id="k", key=Lane.BULK.queue, attempt=1, raw=b"", moments=StageTimestamps(claimed_s=0.0))
    again.error = ErrorInfo(code=ErrorCode.SOURCE_UNAVAILABLE, message="m")
    cancelled = Job(id="l", key=Lane.BULK.queue, attempt=1, raw=b"", moments=StageTimestamps(claimed_s=0.0))
    metrics.retried([Released(job, Release(job.id)) for job in (again, cancelled)])
    metrics.renewed(5)
    metrics.reaped(2)
    metrics.duty_failed("trim")
    metrics.batch("full", 8)
    metrics.load(LoadReport(seconds=30.0, pictures=1, batches=1, idle=0.25, device=0.5, fetch=0.1, decode=0.2))
    metrics.queues(make_snapshot(waiting=4, oldest_age_s=3.0), {Lane.INTERACTIVE: 0.0, Lane.BULK: 8.0})
    metrics.gpu(lambda: GpuState(used_bytes=1, total_bytes=4, utilisation=None))
    metrics.model(ModelInfo(id='a "model"', revision="r", dtype="float16", device="NVIDIA X"))
    metrics.loader_restarts(lambda: 3)
    metrics.state(is_ready=lambda: True, age_s=lambda: 1.5)
    values = samples(metrics)
    expected = {
        'shiwu_retries_total{code="source_unavailable"}': 1,
        "shiwu_leases_renewed_total": 5,
        "shiwu_leases_reaped_total": 2,
        'shiwu_duty_failures_total{duty="trim"}': 1,
        'shiwu_duty_failures_total{duty="leases"}': 0,
        'shiwu_batches_total{reason="full"}': 1,
        'shiwu_batch_size_bucket{le="8.0"}': 1,
        'shiwu_limit_ratio{what="device"}': 0.5,
        'shiwu_queue_waiting{lane="bulk"}': 4,
        'shiwu_queue_oldest_age_seconds{lane="bulk"}': 3.0,
        'shiwu_queue_oldest_age_seconds{lane="interactive"}': 0.0,
        'shiwu_queue_backlog_seconds{lane="bulk"}': 8.0,
        "shiwu_dead_letters": 9,
        "shiwu_gpu_memory_total_bytes": 4,
        'shiwu_model_info{device="NVIDIA X",dtype="float16",model="a \\"model\\"",revision="r"}': 1,
        "shiwu_loader_restarts_total": 3,
        "shiwu_worker_ready": 1,
        "shiwu_progress_age_seconds": 1.5,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert "shiwu_gpu_utilisation_ratio" not in values
    assert not [name for name in values if re.match(r"shiwu_.*_created", name)]


@NEEDS_PROMTOOL
def test_promtool_accepts_the_metrics() -> None:
    """Names, types, units and help, before the first job."""
    assert check_metrics(Metrics(retried=RETRIABLE).text()) == ""


def test_counting_a_job_costs_little() -> None:
    """A job costs a worker about 70 µs of CPU in total, so all answers of a commit are counted together."""
    metrics = Metrics(retried=RETRIABLE)
    batch = [settled() for _ in range(256)]
    best_s = math.inf
    for _ in range(20):
        began_s = time.perf_counter()
        metrics.answered(batch)
        best_s = min(best_s, time.perf_counter() - began_s)
    assert best_s / len(batch) < 15e-6


def test_value_on_a_bucket_bound_counts_below_it() -> None:
    """Buckets count values up to their `le`; NaN is not counted, and larger values are only in +Inf."""
    histograms = BatchHistogram("h_seconds", "t", label="x", values=("a", "b"), buckets=(1.0, 2.5))
    histograms.observe(np.array([0, 0, 1, 1]), np.array([1.0, 9.0, np.nan, 2.0]))
    registry = CollectorRegistry()
    registry.register(histograms)
    lines = [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    assert lines == [
        'h_seconds_bucket{le="1",x="a"} 1.0',
        'h_seconds_bucket{le="2.5",x="a"} 1.0',
        'h_seconds_bucket{le="+Inf",x="a"} 2.0',
        'h_seconds_count{x="a"} 2.0',
        'h_seconds_sum{x="a"} 10.0',
        'h_seconds_bucket{le="1",x="b"} 0.0',
        'h_seconds_bucket{le="2.5",x="b"} 1.0',
        'h_seconds_bucket{le="+Inf",x="b"} 1.0',
        'h_seconds_count{x="b"} 1.0',
        'h_seconds_sum{x="b"} 2.0',
    ]


class Driver:
    """NVML with one GPU."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound

    def __init__(self) -> None:
        self.starts = 0
        self.fails: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=3, total=8),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=40),
        }

        def call(*args: Any) -> Any:
            self.starts += name == "nvmlInit"
            if name in self.fails:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
            return answers[name](*args)

        return call


def test_gpu_monitor_initialises_nvml_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing value is None; a GPU that fails has no state until it answers again."""
    driver = Driver()
    monkeypatch.setattr("shiwu_worker.telemetry.gpu_monitor.pynvml", driver)
    monkeypatch.setattr("shiwu_worker.runtime.nvidia.pynvml", driver)
    monitor = GpuMonitor("GPU-1")
    assert monitor.state() is None
    monitor.update()
    assert monitor.state() == GpuState(used_bytes=3, total_bytes=8, utilisation=0.4)
    driver.fails = {"nvmlDeviceGetUtilizationRates"}
    monitor.update()
    assert monitor.state() == GpuState(used_bytes=3, total_bytes=8, utilisation=None)
    driver.fails = {"nvmlDeviceGetMemoryInfo"}
    monitor.update()
    assert monitor.state() is None
    assert driver.starts == 1


def test_gpu_monitor_without_a_driver_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU state on a CPU or without the driver's library."""
    driver = Driver()
    monkeypatch.setattr("shiwu_worker.telemetry.gpu_monitor.pynvml", driver)
    GpuMonitor(None).update()
    assert driver.starts == 0

    def absent() -> None:
        driver.starts += 1
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(driver, "nvmlInit", absent, raising=False)
    monitor = GpuMonitor("GPU-1")
    monitor.update()
    monitor.update()
    assert (monitor.state(), driver.starts) == (None, 1)
