"""Spans of jobs and batches, made by the SDK and kept in memory."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import ValidationError
from structlog.testing import capture_logs

from shiwu.broker.answers import AnswerEntry
from shiwu.broker.message_writer import build_message
from shiwu.contract import Answer, ErrorCode, ErrorInfo, ImageInfo, Lane, ModelInfo, Request, Stage, Status, Timing
from shiwu_worker.config.settings import Settings
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.telemetry.tracing import Traces, make_provider

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TIMES = Timing(queue=100.0, claim=1.0, fetch=20.0, decode=5.0, batch=2.0, encode=50.0, score=0.5, total=178.5)
MODEL = ModelInfo(id="m", revision="r", dtype="float32", device="cpu")
CLOSE_S = 10.0


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Where the spans of `traces_of` end."""
    kept = InMemorySpanExporter()
    yield kept
    kept.shutdown()


def traces_of(exporter: SpanExporter, **options: Any) -> Traces:
    """A tracer that exports each span immediately."""
    return Traces(make_provider(worker="w-1", processor=SimpleSpanProcessor(exporter)), **options)


def job_of(name: str, *, trace: str | None = None, **fields: Any) -> Job:
    """A job before its answer."""
    headers = None if trace is None else {"traceparent": trace}
    raw = build_message(Request(image="s3://b/k"), job_id=name, lane=Lane.BULK, trace=headers)
    moments = StageTimestamps(claimed_s=time.monotonic() - 0.5)
    return Job(id=name, key=Lane.BULK.queue, attempt=1, raw=raw, moments=moments, **fields)


def settled(job: Job, *, code: ErrorCode | None = None, is_first: bool = True, **fields: Any) -> CommittedJob:
    """A committed job."""
    error = None if code is None else ErrorInfo(code=code, message="expected a picture", stage=Stage.DECODE)
    status = Status.TAGGED if code is None else Status.REJECTED
    image = ImageInfo(reference="https://host/a.jpg")
    named = {"id": job.id, "status": status, "timing": TIMES, "error": error, "image": image, "model": MODEL} | fields
    return CommittedJob(job, AnswerEntry(answer=Answer(**named), id=job.id), 0.002, is_first)


def made(exporter: InMemorySpanExporter, *lists: list[CommittedJob]) -> dict[str, ReadableSpan]:
    """Return the spans of these answers by job id, or by the batch's reason."""
    traces = traces_of(exporter)
    traces.start()
    for each in lists:
        traces.answered(each)
    traces.close(timeout_s=CLOSE_S)
    spans = {}
    for span in exporter.get_finished_spans():
        attributes = dict(span.attributes or {})
        spans[str(attributes.get("messaging.message.id") or attributes["shiwu.batch.reason"])] = span
    return spans


def own(span: ReadableSpan) -> tuple[int, int]:
    """Return its trace id and span id."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    """Return trace id and span id of the spans that it links to."""
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def test_job_span_continues_the_trace_of_its_producer(exporter: InMemorySpanExporter) -> None:
    """A span has parent, kind, names, times from claim to answer, and stages."""
    before_ns = time.time_ns()
    job = job_of("a", trace=PARENT)
    span = made(exporter, [settled(job, batch_size=3)])["a"]
    assert (span.name, span.kind, span.status.status_code) == ("shiwu.tag", SpanKind.CONSUMER, StatusCode.UNSET)
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.start_time == pytest.approx(before_ns - 0.5e9, abs=0.2e9)
    assert span.end_time == pytest.approx(before_ns, abs=0.4e9)
    assert dict(span.attributes or {}) == {
        "messaging.system": "redis",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "shiwu.bulk",
        "messaging.message.id": "a",
        "shiwu.status": "tagged",
        "shiwu.attempts": 1,
        "shiwu.discarded": False,
        "shiwu.image": "https://host/a.jpg",
        "shiwu.batch_size": 3,
        "shiwu.queue_ms": 100.0,
        "shiwu.claim_ms": 1.0,
        "shiwu.fetch_ms": 20.0,
        "shiwu.decode_ms": 5.0,
        "shiwu.batch_ms": 2.0,
        "shiwu.encode_ms": 50.0,
        "shiwu.score_ms": 0.5,
        "shiwu.total_ms": 178.5,
        "shiwu.commit_ms": 2.0,
    }
    assert {"service.name": "shiwu-worker", "service.instance.id": "w-1"}.items() <= span.resource.attributes.items()


def test_span_of_a_failed_job_has_its_code(exporter: InMemorySpanExporter) -> None:
    """A dead letter's span has an error status, a cancelled job's has none."""
    cancelled = settled(job_of("b"), code=ErrorCode.CANCELLED, status=Status.CANCELLED)
    spans = made(exporter, [settled(job_of("a"), code=ErrorCode.PICTURE_BROKEN), cancelled])
    assert (spans["a"].status.status_code, spans["a"].status.description) == (StatusCode.ERROR, "expected a picture")
    assert spans["a"].attributes is not None
    assert spans["a"].attributes["error.type"] == spans["a"].attributes["shiwu.error.code"] == "picture_broken"
    assert spans["a"].attributes["shiwu.error.stage"] == "decode"
    assert spans["b"].status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "trace", [None, "", "00-0-0-01", "zz" + PARENT[2:], PARENT.replace("b7ad6b7169203331", "0" * 16)]
)
def test_job_without_a_valid_parent_begins_a_trace(exporter: InMemorySpanExporter, trace: str | None) -> None:
    """An invalid trace context in a message loses no span."""
    span = made(exporter, [settled(job_of("a", trace=trace))])["a"]
    assert span.parent is None


@given(st.text(max_size=60))
def test_any_trace_header_still_gives_a_span(text: str) -> None:
    """Any text at all."""
    exporter = InMemorySpanExporter()
    assert made(exporter, [settled(job_of("a", trace=text))]).keys() == {"a"}


def test_batch_span_and_job_spans_are_linked(exporter: InMemorySpanExporter) -> None:
    """Two batches in one commit, a job of none, and a batch of more than OpenTelemetry's own limit of 128 links."""
    traces = traces_of(exporter)
    first = [job_of(f"a{n}", trace=PARENT) for n in range(3)]
    large = [job_of(f"b{n}") for n in range(300)]
    traces.batch_left("full", first)
    traces.batch_left("free", large)
    first[0].scored_s = time.monotonic()
    spans = made(exporter, [settled(job) for job in [*large, *first, job_of("alone")]])
    for reason, jobs in (("full", first), ("free", large)):
        batch = spans[reason]
        members = [spans[job.id] for job in jobs]
        assert linked(batch) == [own(span) for span in members]
        assert all(linked(span) == [own(batch)] for span in members)
        assert batch.attributes is not None
        assert batch.attributes["messaging.batch.message_count"] == len(jobs)
        assert batch.attributes["shiwu.model"] == "m"
        assert batch.parent is None
    assert spans["alone"].links == ()
    assert len(spans) == 306


def test_batch_in_several_commits_counts_each_job_once(exporter: InMemorySpanExporter) -> None:
    """Interactive jobs are committed apart from bulk ones of their batch."""
    traces = traces_of(exporter)
    jobs = [job_of(f"a{n}", trace=PARENT) for n in range(3)]
    traces.batch_left("full", jobs)
    made(exporter, [settled(job) for job in jobs[:1]], [settled(job) for job in jobs[1:]])
    batches = [span.attributes or {} for span in exporter.get_finished_spans() if span.name == "shiwu.batch"]
    assert sorted(each["messaging.batch.message_count"] for each in batches) == [1, 2]
    assert {each["shiwu.batch_size"] for each in batches} == {3}


def test_job_that_its_producer_does_not_sample_has_no_span(exporter: InMemorySpanExporter) -> None:
    """Nor has a batch of such jobs; in a mixed one only the others are linked."""
    traces = traces_of(exporter)
    quiet = [job_of("a", trace=PARENT[:-2] + "00")]
    mixed = [job_of("b", trace=PARENT[:-2] + "00"), job_of("c")]
    traces.batch_left("free", quiet)
    traces.batch_left("full", mixed)
    spans = made(exporter, [settled(job) for job in quiet + mixed])
    assert spans.keys() == {"c", "full"}
    assert linked(spans["full"]) == [own(spans["c"])]


class _Stuck(SpanExporter):
    """An exporter that blocks until it is released."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.taken = 0

    def export(self, spans: Any) -> SpanExportResult:
        self.go.wait(30)
        self.taken += len(spans)
        return SpanExportResult.SUCCESS


def test_spans_over_the_limit_are_dropped_and_logged() -> None:
    """Neither a commit waits, nor does closing wait longer than its limit."""
    exporter = _Stuck()
    traces = traces_of(exporter, max_waiting=10)
    with capture_logs() as logs:
        traces.start()
        began_s = time.monotonic()
        for n in range(50):
            traces.answered([settled(job_of(f"{n}-{k}")) for k in range(2)])
        assert time.monotonic() - began_s < 20
        began_s = time.monotonic()
        traces.close(timeout_s=0.2)
        assert time.monotonic() - began_s < 20
        exporter.go.set()
        traces._thread.join(CLOSE_S)
    assert not traces._thread.is_alive
    dropped = [line for line in logs if line["event"] == "traces_dropped"]
    assert [line["event"] for line in logs if line["event"] == "traces_unsent"] == ["traces_unsent"]
    assert sum(line["jobs"] for line in dropped) + exporter.taken == 100
    assert exporter.taken <= 14
    assert len(dropped) <= 2


def test_defect_in_tracing_loses_only_its_spans(exporter: InMemorySpanExporter) -> None:
    """The thread continues, and logs the error once."""
    broken: Any = [None]
    with capture_logs() as logs:
        assert made(exporter, broken, broken, [settled(job_of("a"))]).keys() == {"a"}
    assert [line["event"] for line in logs] == ["traces_failed"]


def test_opentelemetry_variables_take_effect(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name for the service, a sampler."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tagger")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=i,deployment.environment.name=test")
    resource = made(exporter, [settled(job_of("a"))])["a"].resource.attributes
    assert resource["service.name"] == "tagger"
    assert resource["service.instance.id"] == "i"
    assert resource["deployment.environment.name"] == "test"
    exporter.clear()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert made(exporter, [settled(job_of("a"))]) == {}


def test_header_that_cannot_be_read_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenTelemetry itself would log it whole, with its password."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization Bearer hush,x y=hush")
    make_provider(worker="w").shutdown()
    assert "Header format invalid" in caplog.text
    assert "hush" not in caplog.text


def test_worker_without_traces_loads_no_opentelemetry() -> None:
    """Checked for the modules of a worker; redis-py may load it on its own."""
    code = "import sys; hidden = {'opentelemetry.sdk': None, 'opentelemetry.metrics': None}; sys.modules |= hidden; "
    code += "import shiwu_worker.service.bootstrap; print(*(set(sys.modules) - hidden.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "shiwu_worker.service.observability" in loaded.split()
    assert not {"opentelemetry.trace", "opentelemetry.sdk.trace", "shiwu_worker.telemetry.tracing"} & set(
        loaded.split()
    )


def test_traces_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is not installed, the settings are refused with a text that names the remedy."""
    monkeypatch.setenv("SHIWU_TRACES", "true")
    assert Settings().traces
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.machinery.PathFinder.find_spec

    def hidden(name: str, *args: Any) -> Any:
        return None if name.startswith("opentelemetry.exporter") else found(name, *args)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", staticmethod(hidden))
    with pytest.raises(ValidationError, match=r"pip install '\.\[worker,otel\]'"):
        Settings()
