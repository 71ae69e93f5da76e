"""All by which a worker is watched from outside: probe files, the HTTP port, numbers, traces, the known picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import redis
import structlog

from shiwu.broker.queue_stats import QueueSnapshot, shared_snapshot
from shiwu.contract import RETRIABLE, Lane
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health.http_server import HealthServer
from shiwu_worker.health.monitor import HealthMonitor, LivenessSources
from shiwu_worker.health.probe_files import ProbeFiles
from shiwu_worker.health.readiness import Readiness
from shiwu_worker.pipeline.heartbeat import HeartbeatHooks
from shiwu_worker.runtime.progress import LoadMeter, LoadReport, Progress
from shiwu_worker.service.factories import stuck_after_s
from shiwu_worker.telemetry.gpu_monitor import GpuMonitor
from shiwu_worker.telemetry.metrics import Metrics
from shiwu_worker.telemetry.queue_monitor import SNAPSHOT_EVERY_S, QueueMonitor

if TYPE_CHECKING:
    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.outcome import CommittedJob
    from shiwu_worker.loaders.pool import LoaderPool
    from shiwu_worker.pipeline.pipeline import Pipeline
    from shiwu_worker.telemetry.tracing import Traces

log: Any = structlog.get_logger()
_THREADS = ("claim", "encode", "score", "commit", "heartbeat", "cancellations")
TRACES_CLOSE_S = 3.0
REVOKE_WAIT_S = 15.0
"""Longer than Celery's half takes to connect again; a Redis user without its rights must not keep a worker unready."""


class Observability:
    """One for each worker. Where no HTTP port is set nothing is counted and no queue is looked at."""

    def __init__(self, settings: Settings, progress: Progress, *, waits_for_revokes: bool = False) -> None:
        self._settings = settings
        self._probe_files = ProbeFiles(ready_file=settings.ready_file, alive_file=settings.alive_file)
        self._probe_files.set_ready(is_ready=False)
        self._readiness = Readiness(on_change=self._on_ready, revoke_wait_s=REVOKE_WAIT_S if waits_for_revokes else 0.0)
        self._monitor = HealthMonitor(
            progress,
            redis_timeout_s=settings.redis_timeout_s,
            is_waiting_for_revokes=self._readiness.is_waiting_for_revokes,
        )
        self._metrics = Metrics(retried=RETRIABLE) if settings.http_port else None
        self._traces: Traces | None = None
        self._began_s = time.monotonic()
        self._has_been_ready = False

    def open(self, stack: ExitStack) -> None:
        """Answer on the HTTP port, if there is one: not ready, and no job counted, while the model loads.

        Raises:
            FatalError: when the port can't be had, or OpenTelemetry does not take its settings.
        """
        if self._settings.traces:
            self._traces = _open_traces(stack, worker=self._settings.worker_name)
        if self._metrics is None:
            return
        endpoint = HealthServer(
            host=self._settings.http_host,
            port=self._settings.http_port,
            not_live=self._monitor.not_live,
            not_ready=self._monitor.not_ready,
            metrics=self._metrics.text,
        )
        self._metrics.state(is_ready=lambda: not self._monitor.not_ready(), age_s=self._monitor.stalled_s)
        stack.callback(endpoint.close)
        endpoint.start()

    def hooks(self, pipeline: Pipeline, meter: LoadMeter, *, suspects: Callable[[], None]) -> HeartbeatHooks:
        """What the heartbeat sees and tells."""
        metrics = self._metrics

        def load() -> LoadReport:
            seen = meter.read()
            if metrics is not None:
                metrics.load(seen)
            return seen

        counts: dict[str, Any] = {"renewed": metrics.renewed, "reaped": metrics.reaped} if metrics is not None else {}
        return HeartbeatHooks(
            held=pipeline.held,
            alive=self._probe_files.touch_alive,
            suspects=suspects,
            load=load,
            redis=self._on_redis,
            **counts,
        )

    def watch(self, stack: ExitStack, client: redis.Redis, encoder: Any, loaders: LoaderPool) -> None:
        """Look at the queues and the card until the stack is closed, where there is a port to tell it on."""
        metrics = self._metrics
        if metrics is None:
            return
        gpu = GpuMonitor(encoder.gpu_uuid)
        metrics.gpu(gpu.state)
        metrics.model(encoder.info)
        metrics.sizes(largest=lambda: encoder.size_policy.largest, threads=lambda: encoder.threads)
        metrics.loader_restarts(lambda: loaders.restarts)

        def on_snapshot(seen: QueueSnapshot, backlog_s: dict[Lane, float]) -> None:
            metrics.queues(seen, backlog_s)
            self._monitor.waiting(sum(seen.waiting.get(lane, 0) for lane in self._settings.lanes))

        watch = QueueMonitor(
            partial(shared_snapshot, client, max_age_s=SNAPSHOT_EVERY_S),
            on_snapshot=on_snapshot,
            on_redis_unavailable=metrics.redis_unreachable,
            before_each=gpu.update,
        )
        stack.callback(watch.close)
        watch.start()

    def started(self, pipeline: Pipeline, encoder: Any, loaders: LoaderPool) -> None:
        """All parts run: from now on their stillness counts."""
        body = LivenessSources(
            threads=_THREADS,
            held=lambda: len(pipeline.held()),
            encode_age_s=pipeline.encode_age_s,
            loaders=lambda: loaders.pids,
            stuck_s=lambda: stuck_after_s(self._settings, encoder),
        )
        self._monitor.started(body)

    def claiming(self, *, active: bool) -> None:
        """Claims succeed, or have ended."""
        self._monitor.claiming(active=active)
        self._readiness.claiming(active=active)

    def receiving_revokes(self, *, active: bool) -> None:
        """What is broadcast to workers is heard, or not."""
        self._readiness.receiving_revokes(active=active)

    def _on_redis(self, available: bool) -> None:
        """Redis answered the heartbeat, or not; once a second, so that a limit of time is noticed."""
        self._monitor.redis(available=available)
        self._readiness.check_limit()

    def _on_ready(self, is_ready: bool) -> None:
        """Tell the probes, and the log the first time."""
        if is_ready and not self._has_been_ready:
            self._has_been_ready = True
            after_s = round(time.monotonic() - self._began_s, 3)
            log.info("ready", worker=self._settings.worker_name, after_s=after_s)
        self._probe_files.set_ready(is_ready=is_ready)

    def wrong(self, what: str) -> None:
        """The known picture got a wrong answer."""
        self._probe_files.set_ready(is_ready=False)
        self._monitor.canary(what)

    def stopping(self) -> None:
        """The worker drains."""
        self._monitor.stopping()

    def answered(self, settled: Sequence[CommittedJob]) -> None:
        """Count answers, and make their spans."""
        if self._metrics is not None:
            self._metrics.answered(settled)
        if self._traces is not None:
            self._traces.answered(settled)

    def remove(self, jobs: Sequence[Job]) -> None:
        """Count what is tried again among the jobs that left: all of them were answered, or all given back."""
        if self._metrics is not None and jobs and jobs[0].back is not None:
            self._metrics.retried(jobs)

    def batch_left(self, reason: str, jobs: Sequence[Job]) -> None:
        """Count a batch, and note it for its span."""
        if self._metrics is not None:
            self._metrics.batch(reason, len(jobs))
        if self._traces is not None:
            self._traces.batch_left(reason, jobs)


def _open_traces(stack: ExitStack, *, worker: str) -> Traces:
    from shiwu_worker.telemetry.tracing import Traces, make_provider  # noqa: PLC0415 OpenTelemetry is an extra

    try:
        traces = Traces(make_provider(worker=worker))
    except ValueError as error:
        text = f"expected OTEL_… variables that OpenTelemetry understands: {error}"
        raise FatalError(ExitCode.CONFIG, text) from error
    stack.callback(traces.close, timeout_s=TRACES_CLOSE_S)
    traces.start()
    return traces
