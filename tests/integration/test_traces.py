"""A real worker that sends its spans to a collector, to none, or to one that hangs."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from shiwu import Client
from shiwu.contract import Status
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.otlp import Collector
from tests.support.processes import LOOPBACK
from tests.support.waiting import wait_until

CLOSE_S = 3.0
"""What a worker gives its spans at its end."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Takes everything."""
    with Collector() as listening:
        yield listening


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A good one, for a worker with `allow_folders=tmp_path`."""
    path = tmp_path / "x.png"
    path.write_bytes(pictures.png(pictures.picture()))
    return path.as_uri()


def has_exporter(pid: int) -> bool:
    """Whether a process has loaded protobuf's library, which nothing but the exporter needs."""
    return "google/_upb" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def events(log_text: str) -> list[dict[str, Any]]:
    """The log's lines."""
    return [json.loads(line) for line in log_text.splitlines() if line.startswith("{")]


def test_trace_of_the_producer_continues_in_the_worker(
    start_worker: StartWorker, redis_url: str, tmp_path: Path, picture: str, collector: Collector
) -> None:
    """Jobs of two traces and of none, one that fails: each has its parent, and their batches link to them."""
    worker = start_worker(redis_url=redis_url, traces=True, allow_folders=tmp_path, env=collector.env)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("producer")
    asked: dict[str, Any] = {}
    before_ns = time.time_ns()
    with Client(redis_url) as client:
        for name in ("first", "second"):
            with tracer.start_as_current_span(name) as span:
                for job_id in client.enqueue_many([{"image": picture, "id": f"{name}-{n}"} for n in range(4)]):
                    asked[job_id] = span.get_span_context()
                client.enqueue(f"{picture}.none", id=f"{name}-bad")
                asked[f"{name}-bad"] = span.get_span_context()
        client.enqueue(picture, id="alone")
        answers = client.wait_many([*asked, "alone"], timeout_s=30)
    spans = {
        job_id: wait_until(lambda job_id=job_id: collector.of_job(job_id), timeout_s=10, what=f"span of {job_id}")
        for job_id in answers
    }
    for job_id, context in asked.items():
        assert spans[job_id].trace_id == f"{context.trace_id:032x}"
        assert spans[job_id].parent_id == f"{context.span_id:016x}"
    assert spans["alone"].parent_id == ""
    assert has_exporter(worker.pid)
    for job_id, span in spans.items():
        assert before_ns - 1e9 < span.start_ns < span.end_ns < time.time_ns() + 1e9
        assert span.is_error == job_id.endswith("-bad")
        assert span.attributes["shiwu.status"] == answers[job_id].status.value
        assert span.resource["service.name"] == "shiwu-worker"
    assert spans["first-bad"].attributes["shiwu.error.code"] == "source_not_found"
    batches = [span for span in collector.spans() if span.name == "shiwu.batch"]
    tagged = {spans[job_id].span_id for job_id, answer in answers.items() if answer.status is Status.TAGGED}
    assert sorted(link for batch in batches for link in batch.links) == sorted(tagged)
    assert sum(batch.attributes["messaging.batch.message_count"] for batch in batches) == len(tagged)
    assert {batch.attributes["shiwu.batch.reason"] for batch in batches} <= {"full", "free"}
    of_batch = {batch.span_id for batch in batches}
    assert all(set(span.links) <= of_batch and len(span.links) == 1 for span in spans.values() if not span.is_error)
    worker.terminate()
    assert worker.wait(timeout_s=15) == 0
    assert [line for line in events(worker.log_text()) if str(line["event"]).startswith("traces_")] == []


@pytest.mark.long
def test_last_spans_are_sent_at_the_shutdown(
    start_worker: StartWorker, redis_url: str, tmp_path: Path, picture: str, collector: Collector
) -> None:
    """A worker that ends before the exporter's pause is over."""
    env = collector.env | {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    worker = start_worker(redis_url=redis_url, traces=True, allow_folders=tmp_path, env=env)
    with Client(redis_url) as client:
        client.tag(picture, timeout_s=30, id="last")
    assert collector.requests == 0
    worker.terminate()
    assert worker.wait(timeout_s=15) == 0
    assert collector.of_job("last") is not None


@pytest.mark.long
def test_no_span_is_sent_without_the_setting(
    start_worker: StartWorker, redis_url: str, tmp_path: Path, picture: str, collector: Collector
) -> None:
    """The variables of OpenTelemetry alone turn nothing on, and its packages are not loaded."""
    worker = start_worker(redis_url=redis_url, allow_folders=tmp_path, env=collector.env)
    with Client(redis_url) as client:
        client.tag(picture, timeout_s=30)
    assert not has_exporter(worker.pid)
    worker.terminate()
    assert worker.wait(timeout_s=15) == 0
    assert collector.requests == 0


@pytest.fixture
def hanging() -> Iterator[dict[str, str]]:
    """Variables of a collector that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(64)
        url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "60", "OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.mark.long
def test_hanging_collector_delays_nothing(
    start_worker: StartWorker, redis_url: str, tmp_path: Path, picture: str, hanging: dict[str, str]
) -> None:
    """All jobs are answered, and the end comes a bounded time later than without traces."""
    worker = start_worker(redis_url=redis_url, traces=True, allow_folders=tmp_path, env=hanging)
    with Client(redis_url) as client:
        ids = list(client.enqueue_many([picture] * 40))
        assert {answer.status for answer in client.wait_many(ids, timeout_s=60).values()} == {Status.TAGGED}
    began_s = time.monotonic()
    worker.terminate()
    assert worker.wait(timeout_s=25) == 0
    took_s = time.monotonic() - began_s
    left = [line for line in events(worker.log_text()) if line["event"] == "traces_unsent"]
    assert len(left) == 1
    assert took_s < CLOSE_S + 7.0, "without traces an idle worker ends within a few seconds"


def test_wrong_otel_variables_stop_the_start(start_worker: StartWorker, redis_url: str) -> None:
    """Exit code 64, before anything is claimed."""
    env = {"OTEL_BSP_SCHEDULE_DELAY": "-5"}
    worker = start_worker(redis_url=redis_url, traces=True, ready=False, env=env)
    assert worker.wait(timeout_s=60) == 64
    assert "expected OTEL_… variables that OpenTelemetry understands" in worker.log_text()
