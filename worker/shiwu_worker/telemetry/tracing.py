"""OpenTelemetry: a span for each job that was answered, and one for each batch, linked to each other.

Imported only where `SHIWU_TRACES` is set; OpenTelemetry is an extra. Spans are made after the answer, on a thread of
their own, from the moments that a job carries anyway. The pipeline's threads only leave the jobs here.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shiwu.broker.trace_headers import read_headers
from shiwu.contract import TASK_NAME, Answer, Status
from shiwu_worker.jobs.job import Departure, Job

if TYPE_CHECKING:
    from shiwu_worker.jobs.outcome import CommittedJob

log: Any = structlog.get_logger()
MAX_WAITING: Final = 4096
"""Jobs whose spans are not made yet; more are dropped, for traces are a view and not the ledger."""
MAX_LINKS: Final = 512
"""The largest batch that the settings allow; OpenTelemetry's own limit is 128."""
LOG_EVERY_S: Final = 60.0
POLL_INTERVAL_S: Final = 1.0
_FAILED: Final = {Status.REJECTED, Status.FAILED}
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def make_provider(*, worker: str, processor: SpanProcessor | None = None) -> TracerProvider:
    """A provider that is nobody's global one, set up by the `OTEL_…` variables.

    Args:
        worker: `service.instance.id`, where the variables name none.
        processor: takes the ended spans; by default they are sent over OTLP/HTTP, many at a time.

    Raises:
        ValueError: a variable says what OpenTelemetry does not understand.
    """
    own = {"service.name": "shiwu-worker", "service.version": version("shiwu"), "service.instance.id": worker}
    told = OTELResourceDetector().detect().attributes
    resource = Resource.create({name: value for name, value in own.items() if name not in told})
    limits = None if "OTEL_SPAN_LINK_COUNT_LIMIT" in os.environ else SpanLimits(max_links=MAX_LINKS)
    provider = TracerProvider(resource=resource, span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class _Clock:
    """Nanoseconds since 1970 of this process' monotonic seconds, as both clocks stand now."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()
        self._wall_ns = time.time_ns()

    def ns(self, moment_s: float) -> int:
        return self._wall_ns - int((self.now_s - moment_s) * 1e9)


class Traces:
    """Makes spans from `start` to `close`."""

    def __init__(self, provider: TracerProvider, *, most_waiting: int = MAX_WAITING) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("shiwu_worker", version("shiwu"))
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[_Clock, Sequence[CommittedJob]]] = deque()
        self._jobs_waiting = 0
        self._dropped = 0
        self._said_s: float | None = None
        self._has_failed = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def batch_left(self, reason: str, jobs: Sequence[Job]) -> None:
        """Note on jobs that leave for the device with which batch they do. Never blocks."""
        departure = Departure(reason, len(jobs), time.monotonic())
        for job in jobs:
            job.departure = departure

    def answered(self, settled: Sequence[CommittedJob]) -> None:
        """Take jobs that have just been answered, all those of a batch at once. Never blocks for long."""
        with self._changed:
            if self._jobs_waiting + len(settled) > self._most_waiting:
                self._dropped += len(settled)
                return
            self._jobs_waiting += len(settled)
            self._waiting.append((_Clock(), settled))
            self._changed.notify()

    def close(self, *, timeout_s: float) -> None:
        """Make and send what is left, for `timeout_s` at most; the rest is dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("traces_unsent", jobs=self._jobs_waiting, waited_s=timeout_s)

    def _run(self) -> None:
        is_closed = False
        while not is_closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed, POLL_INTERVAL_S)
                taken = self._waiting.popleft() if self._waiting else None
                if taken is not None:
                    self._jobs_waiting -= len(taken[1])
                is_closed = self._is_closed and taken is None
            if taken is not None:
                self._guarded(*taken)
            self._say_dropped(is_last=is_closed)
        # Up to its own 30 s where nobody takes the spans; `close` does not wait that long.
        self._provider.shutdown()

    def _guarded(self, clock: _Clock, settled: Sequence[CommittedJob]) -> None:
        try:
            self._make(clock, settled)
        except Exception:  # border: traces are a view; a defect in them must not cost a job
            if not self._has_failed:
                log.exception("traces_failed")
            self._has_failed = True

    def _say_dropped(self, *, is_last: bool) -> None:
        now_s = time.monotonic()
        if self._dropped and (is_last or self._said_s is None or now_s - self._said_s >= LOG_EVERY_S):
            self._said_s = now_s
            with self._changed:
                dropped, self._dropped = self._dropped, 0
            log.warning("traces_dropped", jobs=dropped)

    def _make(self, clock: _Clock, settled: Sequence[CommittedJob]) -> None:
        spans: list[Span] = []
        batches: dict[Departure, list[tuple[CommittedJob, Span]]] = {}
        for one in settled:
            span = self._job_span(clock, one)
            spans.append(span)
            if one.job.departure is not None and span.is_recording():
                batches.setdefault(one.job.departure, []).append((one, span))
        for departure, members in batches.items():
            self._batch_span(clock, departure, members)
        for span in spans:
            span.end(clock.ns(clock.now_s))

    def _job_span(self, clock: _Clock, one: CommittedJob) -> Span:
        """The span of a job, not ended yet: from its claim, and the child of whatever its message names."""
        job, answer = one.job, one.entry.answer
        span = self._tracer.start_span(
            TASK_NAME,
            context=_PROPAGATOR.extract(read_headers(job.raw), context=Context()),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": "redis",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": job.lane.queue,
                "messaging.message.id": job.log_id,
            },
            start_time=clock.ns(job.moments.claimed_s),
        )
        if span.is_recording():
            span.set_attributes(_told(one))
            if answer.status in _FAILED:
                span.set_status(StatusCode.ERROR, answer.error.message if answer.error else None)
        return span

    def _batch_span(self, clock: _Clock, departure: Departure, members: Sequence[tuple[CommittedJob, Span]]) -> None:
        """A root span, from when the batch left until its last job was scored."""
        span = self._tracer.start_span(
            "shiwu.batch",
            context=Context(),
            links=[Link(each.get_span_context()) for _, each in members],
            attributes={
                "messaging.batch.message_count": departure.size,
                "shiwu.batch.reason": departure.reason,
                "shiwu.batch.sampled": len(members),
            },
            start_time=clock.ns(departure.left_s),
        )
        model = next((one.entry.answer.model for one, _ in members if one.entry.answer.model), None)
        if model is not None:
            span.set_attributes({"shiwu.model": model.id, "shiwu.device": model.device, "shiwu.dtype": model.dtype})
        for _, each in members:
            each.add_link(span.get_span_context())
        scored_s = [one.job.scored_s for one, _ in members if one.job.scored_s]
        span.end(clock.ns(max(scored_s, default=clock.now_s)))


def _told(one: CommittedJob) -> dict[str, Any]:
    """What the job's log line says, in attributes."""
    answer: Answer = one.entry.answer
    times = {f"shiwu.{name}_ms": ms for name, ms in msgspec.structs.asdict(answer.timing).items() if ms is not None}
    told: dict[str, Any] = {
        "shiwu.status": str(answer.status),
        "shiwu.attempts": answer.attempts,
        "shiwu.discarded": not one.is_first,
        **times,
        "shiwu.commit_ms": round(one.commit_s * 1000, 3),
    }
    if answer.image is not None:
        told["shiwu.image"] = answer.image.reference
    if answer.batch_size is not None:
        told["shiwu.batch_size"] = answer.batch_size
    if answer.error is not None:
        told |= {"error.type": str(answer.error.code), "shiwu.error.code": str(answer.error.code)}
        if answer.error.stage is not None:
            told["shiwu.error.stage"] = str(answer.error.stage)
    return told
