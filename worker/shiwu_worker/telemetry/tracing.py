"""OpenTelemetry spans: one for each answered job and one for each batch, linked to each other.

Imported only if `SHIWU_TRACES` is set, because OpenTelemetry is an extra. A separate thread makes the spans after the
answer, from the timestamps that each job has. The threads of the pipeline only put jobs into a queue.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
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
from structlog.typing import FilteringBoundLogger

from shiwu.broker.trace_headers import read_headers
from shiwu.contract import TASK_NAME, Answer, Status
from shiwu_worker.jobs.job import Departure, Job
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from shiwu_worker.jobs.outcome import CommittedJob

log: FilteringBoundLogger = structlog.get_logger()
MAX_WAITING: Final = 4096
"""Largest number of jobs whose spans are not made yet; further jobs get no span."""
MAX_LINKS: Final = 512
"""The largest batch size that the settings allow; OpenTelemetry's default limit is 128."""
LOG_EVERY_S: Final = 60.0
POLL_INTERVAL_S: Final = 1.0
_FAILED: Final = {Status.REJECTED, Status.FAILED}
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def make_provider(*, worker: str, processor: SpanProcessor | None = None) -> TracerProvider:
    """Return a provider set up by the `OTEL_…` variables. It is not the global one of the process.

    Args:
        worker: `service.instance.id`, unless the variables name one.
        processor: receives the ended spans; the default sends them in batches over OTLP/HTTP.

    Raises:
        ValueError: OpenTelemetry does not understand a variable.
    """
    # OpenTelemetry would log the whole header if it cannot read it, and headers carry passwords.
    logging.getLogger("opentelemetry.util.re").addFilter(_without_header)
    own = {"service.name": "shiwu-worker", "service.version": version("shiwu"), "service.instance.id": worker}
    from_variables = OTELResourceDetector().detect().attributes
    resource = Resource.create({name: value for name, value in own.items() if name not in from_variables})
    limits = None if "OTEL_SPAN_LINK_COUNT_LIMIT" in os.environ else SpanLimits(max_links=MAX_LINKS)
    provider = TracerProvider(resource=resource, span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _without_header(record: logging.LogRecord) -> bool:
    """Filter that removes the text of the header from a record."""
    record.args = tuple("(omitted, because it may contain a password)" for _ in record.args or ())
    return True


class _Clock:
    """Converts monotonic seconds to nanoseconds since 1970, by the two clocks at its creation."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()
        self._wall_ns = time.time_ns()

    def ns(self, moment_s: float) -> int:
        return self._wall_ns - int((self.now_s - moment_s) * 1e9)


class Traces:
    """Makes spans on its own thread, from `start` to `close`."""

    def __init__(self, provider: TracerProvider, *, max_waiting: int = MAX_WAITING) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("shiwu_worker", version("shiwu"))
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[_Clock, Sequence[CommittedJob]]] = deque()
        self._jobs_waiting = 0
        self._dropped = 0
        self._logged_s: float | None = None
        self._has_failed = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = ServiceThread("traces", self._run, on_fatal=None, stop=self._stop)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def batch_left(self, reason: str, jobs: Sequence[Job]) -> None:
        """Record on the jobs of a batch that leaves for the device which batch it is. Never blocks."""
        departure = Departure(reason, len(jobs), time.monotonic())
        for job in jobs:
            job.departure = departure

    def answered(self, committed: Sequence[CommittedJob]) -> None:
        """Queue the jobs of a commit. Blocks only for the lock."""
        with self._changed:
            if self._jobs_waiting + len(committed) > self._max_waiting:
                self._dropped += len(committed)
                return
            self._jobs_waiting += len(committed)
            self._waiting.append((_Clock(), committed))
            self._changed.notify()

    def close(self, *, timeout_s: float) -> None:
        """Make and send the remaining spans, within `timeout_s`; the others are dropped."""
        if not self._thread.close(timeout_s):
            log.warning("traces_unsent", jobs=self._jobs_waiting, waited_s=timeout_s)

    def _stop(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

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
                self._make_or_log(*taken)
            self._log_dropped(is_last=is_closed)
        # Takes up to 30 s without a collector; `close` does not wait that long.
        self._provider.shutdown()

    def _make_or_log(self, clock: _Clock, committed: Sequence[CommittedJob]) -> None:
        try:
            self._make(clock, committed)
        except Exception:  # border: a defect in traces must not fail a job
            if not self._has_failed:
                log.exception("traces_failed")
            self._has_failed = True

    def _log_dropped(self, *, is_last: bool) -> None:
        now_s = time.monotonic()
        if self._dropped and (is_last or self._logged_s is None or now_s - self._logged_s >= LOG_EVERY_S):
            self._logged_s = now_s
            with self._changed:
                dropped, self._dropped = self._dropped, 0
            log.warning("traces_dropped", jobs=dropped)

    def _make(self, clock: _Clock, committed: Sequence[CommittedJob]) -> None:
        spans: list[Span] = []
        batches: dict[Departure, list[tuple[CommittedJob, Span]]] = {}
        jobs: Counter[Departure] = Counter()
        for one in committed:
            span = self._job_span(clock, one)
            spans.append(span)
            if one.job.departure is not None:
                jobs[one.job.departure] += 1
                if span.is_recording():
                    batches.setdefault(one.job.departure, []).append((one, span))
        for departure, members in batches.items():
            self._batch_span(clock, departure, members, jobs=jobs[departure])
        for span in spans:
            span.end(clock.ns(clock.now_s))

    def _job_span(self, clock: _Clock, one: CommittedJob) -> Span:
        """Start the span of a job at its claim, as a child of the span that its message names."""
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
            span.set_attributes(_attributes(one))
            if answer.status in _FAILED:
                span.set_status(StatusCode.ERROR, answer.error.message if answer.error else None)
        return span

    def _batch_span(
        self, clock: _Clock, departure: Departure, members: Sequence[tuple[CommittedJob, Span]], *, jobs: int
    ) -> None:
        """Make the root span of a batch, from its launch until its last job was scored.

        The jobs of a batch may be committed in portions, as the lanes are. Then each portion has a span of its own.

        Args:
            jobs: how many jobs of the batch were committed together; `members` are those whose traces are sampled.
        """
        span = self._tracer.start_span(
            "shiwu.batch",
            context=Context(),
            links=[Link(each.get_span_context()) for _, each in members],
            attributes={
                "messaging.batch.message_count": jobs,
                "shiwu.batch_size": departure.size,
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


def _attributes(one: CommittedJob) -> dict[str, Any]:
    """Return the facts of the job's log line as attributes."""
    answer: Answer = one.entry.answer
    times = {f"shiwu.{name}_ms": ms for name, ms in msgspec.structs.asdict(answer.timing).items() if ms is not None}
    attributes: dict[str, Any] = {
        "shiwu.status": str(answer.status),
        "shiwu.attempts": answer.attempts,
        "shiwu.discarded": not one.is_first,
        **times,
        "shiwu.commit_ms": round(one.commit_s * 1000, 3),
    }
    if answer.image is not None:
        attributes["shiwu.image"] = answer.image.reference
    if answer.batch_size is not None:
        attributes["shiwu.batch_size"] = answer.batch_size
    if answer.error is not None:
        attributes |= {"error.type": str(answer.error.code), "shiwu.error.code": str(answer.error.code)}
        if answer.error.stage is not None:
            attributes["shiwu.error.stage"] = str(answer.error.stage)
    return attributes
