"""Observability of a worker: log lines, metrics, traces, probe files and the HTTP port."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import structlog

from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import RETRIABLE, Lane
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health.http_server import HealthServer
from shiwu_worker.health.monitor import HealthMonitor, LivenessSources
from shiwu_worker.health.probe_files import ProbeFiles
from shiwu_worker.health.readiness import Readiness
from shiwu_worker.runtime.progress import LoadReport, Progress
from shiwu_worker.telemetry.gpu_monitor import GpuMonitor
from shiwu_worker.telemetry.logs import job_logger
from shiwu_worker.telemetry.metrics import Metrics
from shiwu_worker.telemetry.queue_monitor import QueueMonitor

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.outcome import CommittedJob, Released
    from shiwu_worker.loaders.pool import LoaderPool
    from shiwu_worker.runtime.threads import ServiceThread
    from shiwu_worker.stages.encode.encoder import Encoder
    from shiwu_worker.telemetry.tracing import Traces

log: FilteringBoundLogger = structlog.get_logger()
TRACES_CLOSE_TIMEOUT_S: Final = 3.0
REVOKE_WAIT_S: Final = 15.0
"""Celery reconnects within this time. After it a worker whose user may not receive broadcasts is ready too."""


class Observability:
    """Implements `PipelineObserver`. Without an HTTP port it counts nothing and monitors no queues."""

    def __init__(self, settings: Settings, progress: Progress, *, is_waiting_for_revokes: bool = False) -> None:
        self._settings = settings
        self._probe_files = ProbeFiles(ready_file=settings.ready_file, alive_file=settings.alive_file)
        self._probe_files.set_ready(is_ready=False)
        self._readiness = Readiness(
            on_change=self._on_ready, revoke_wait_s=REVOKE_WAIT_S if is_waiting_for_revokes else 0.0
        )
        self._monitor = HealthMonitor(
            progress,
            redis_timeout_s=settings.redis_timeout_s,
            is_waiting_for_revokes=self._readiness.is_waiting_for_revokes,
        )
        self._metrics = Metrics(retried=RETRIABLE) if settings.http_port else None
        self._traces: Traces | None = None
        self._log_job = job_logger(level=settings.log_level)
        self._shards = 0
        self._away_shards: set[int] = set()
        self._created_s = time.monotonic()
        self._has_been_ready = False

    def open(self, stack: ExitStack) -> None:
        """Open the HTTP port, if one is set, and traces. While the model loads, the port answers "not ready".

        Raises:
            FatalError: if the port cannot be opened, or OpenTelemetry rejects its settings.
        """
        if self._settings.traces:
            self._traces = _open_traces(stack, worker=self._settings.worker_name)
        if self._metrics is None:
            return
        server = HealthServer(
            host=self._settings.http_host,
            port=self._settings.http_port,
            not_live=self._monitor.not_live,
            not_ready=self._monitor.not_ready,
            metrics=self._metrics.text,
        )
        self._metrics.state(is_ready=lambda: not self._monitor.not_ready(), age_s=self._monitor.stalled_s)
        stack.callback(server.close)
        server.start()

    def watch(
        self,
        stack: ExitStack,
        snapshot: Callable[[], QueueSnapshot],
        encoder: Encoder,
        loaders: LoaderPool,
        *,
        words_waiting: Callable[[], Mapping[Lane | None, int]],
    ) -> None:
        """Monitor the queues and the GPU until the stack is closed. Has no effect without an HTTP port.

        Args:
            snapshot: the state of the queues, at most `SNAPSHOT_EVERY_S` old.
        """
        metrics = self._metrics
        if metrics is None:
            return
        gpu = GpuMonitor(encoder.gpu_uuid)
        metrics.gpu(gpu.state)
        metrics.model(encoder.info)
        metrics.sizes(largest=lambda: encoder.size_policy.largest, threads=lambda: encoder.threads)
        metrics.loader_restarts(lambda: loaders.restarts)
        metrics.words_waiting(words_waiting)

        def on_snapshot(snapshot: QueueSnapshot, backlog_s: dict[Lane, float]) -> None:
            metrics.queues(snapshot, backlog_s)
            self._monitor.waiting(sum(snapshot.waiting.get(lane, 0) for lane in self._settings.lanes))

        queue_monitor = QueueMonitor(
            snapshot,
            on_snapshot=on_snapshot,
            on_redis_unavailable=metrics.redis_unreachable,
            on_failed=metrics.duty_failed,
            before_each=gpu.update,
        )
        stack.callback(queue_monitor.close)
        queue_monitor.start()

    def started(
        self,
        *,
        threads: Sequence[ServiceThread],
        in_flight: Collection[str],
        encode_age_s: Callable[[], float],
        loaders: LoaderPool,
        stuck_s: Callable[[], float],
    ) -> None:
        """Report that all parts run. From now on a worker with work and without progress is not live."""
        self._monitor.started(
            LivenessSources(
                threads=threads,
                held=lambda: len(in_flight),
                encode_age_s=encode_age_s,
                loaders=lambda: loaders.pids,
                stuck_s=stuck_s,
            )
        )

    def claiming(self, *, active: bool) -> None:
        """Report whether claims succeed."""
        self._monitor.claiming(active=active)
        self._readiness.claiming(active=active)

    def receiving_revokes(self, *, active: bool) -> None:
        """Report whether Celery's broadcasts to workers are received."""
        self._readiness.receiving_revokes(active=active)

    def alive(self) -> None:
        """Touch the liveness file."""
        self._probe_files.touch_alive()

    def duty_failed(self, name: str) -> None:
        """Count a failure of a duty of a periodic thread."""
        if self._metrics is not None:
            self._metrics.duty_failed(name)

    def redis_available(self, *, available: bool) -> None:
        """Report whether Redis answered the heartbeat. Called every second, so it also checks the wait for revokes."""
        self._monitor.redis(available=available)
        self._readiness.check_limit()

    def shards(self, count: int) -> None:
        """Report that jobs come from so many shards."""
        self._away_shards.clear()
        self._shards = count
        if self._metrics is not None:
            self._metrics.shards(count)

    def shard_away(self, shard: int, *, is_away: bool) -> None:
        """Report whether a shard answers. One call at a time."""
        (self._away_shards.add if is_away else self._away_shards.discard)(shard)
        self._monitor.shards_away(len(self._away_shards), of=self._shards)
        self._readiness.most_shards_away(active=len(self._away_shards) > self._shards / 2)
        if self._metrics is not None:
            self._metrics.shard_away(shard, is_away=is_away)

    def labels_encoded(self, lane: Lane | None, *, words: int, seconds: float) -> None:
        """Count labels and the time of the device for them."""
        if self._metrics is not None:
            self._metrics.labels_encoded(lane, words=words, seconds=seconds)

    def label_sets(self, digests: Mapping[str, str], *, is_done: bool | None) -> None:
        """Report the configured label sets, by name, and whether new files were taken over; None at the start."""
        if self._metrics is not None:
            self._metrics.label_sets(digests, is_done=is_done)

    def shadow_compared(self, images: Mapping[str, int], tags: Mapping[str, int]) -> None:
        """Count images and tags that were compared with those of the shadow label set."""
        if self._metrics is not None:
            self._metrics.shadow_compared(images, tags)

    def images_saved(self, by: str, count: int) -> None:
        """Count images that need not be encoded."""
        if self._metrics is not None:
            self._metrics.images_saved(by, count)

    def leases_renewed(self, count: int) -> None:
        """Count renewed leases."""
        if self._metrics is not None:
            self._metrics.renewed(count)

    def jobs_reaped(self, count: int) -> None:
        """Count jobs that were requeued after their lease had expired."""
        if self._metrics is not None:
            self._metrics.reaped(count)

    def foreign_moved(self, count: int) -> None:
        """Count values of a wrong type that were moved away from the keys of shiwu."""
        if self._metrics is not None:
            self._metrics.foreign_moved(count)

    def load_measured(self, load: LoadReport) -> None:
        """Record how the worker spent its time."""
        if self._metrics is not None:
            self._metrics.load(load)

    def canary_failed(self, reason: str) -> None:
        """Report that the health-check image got a wrong vector. The worker is no longer ready."""
        self._probe_files.set_ready(is_ready=False)
        self._monitor.canary(reason)

    def stopping(self) -> None:
        """Report that the worker drains."""
        self._monitor.stopping()

    def jobs_committed(self, committed: Sequence[CommittedJob]) -> None:
        """Log and count answers, and create their spans."""
        if self._log_job is not None:
            for job in committed:
                self._log_job(job.entry.answer, job.commit_s, not job.is_first)
        if self._metrics is not None:
            self._metrics.answered(committed)
        if self._traces is not None:
            self._traces.answered(committed)

    def jobs_released(self, released: Sequence[Released]) -> None:
        """Count those of the released jobs that failed and get another attempt."""
        if self._metrics is not None:
            self._metrics.retried(released)

    def batch_started(self, reason: str, jobs: Sequence[Job]) -> None:
        """Count a batch, and keep its start for the spans of its jobs."""
        if self._metrics is not None:
            self._metrics.batch(reason, len(jobs))
        if self._traces is not None:
            self._traces.batch_left(reason, jobs)

    def _on_ready(self, is_ready: bool) -> None:
        """Pass readiness to the probes, and log it the first time."""
        if is_ready and not self._has_been_ready:
            self._has_been_ready = True
            after_s = round(time.monotonic() - self._created_s, 3)
            log.info("ready", worker=self._settings.worker_name, after_s=after_s)
        self._probe_files.set_ready(is_ready=is_ready)


def _open_traces(stack: ExitStack, *, worker: str) -> Traces:
    from shiwu_worker.telemetry.tracing import Traces, make_provider  # noqa: PLC0415 OpenTelemetry is an extra

    try:
        traces = Traces(make_provider(worker=worker))
    except ValueError as error:
        text = f"expected OTEL_… variables that OpenTelemetry understands: {error}"
        raise FatalError(ExitCode.CONFIG, text) from error
    stack.callback(traces.close, timeout_s=TRACES_CLOSE_TIMEOUT_S)
    traces.start()
    return traces
