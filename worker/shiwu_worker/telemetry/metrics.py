"""What Prometheus is told: every name, unit and label of the worker.

Labels come from closed sets: lanes, statuses, error codes, stages. Jobs are recorded many at a time, on the thread that
commits them; what others know already (queues, cards) is kept from when they looked, never asked for a scrape.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shiwu.broker.queue_metrics import QueueCollector, QueueNumbers
from shiwu.contract import ErrorCode, Lane, ModelInfo, Stage, Status
from shiwu_worker.telemetry.histograms import LONG_SECONDS, SECONDS, BatchHistogram

if TYPE_CHECKING:
    from shiwu.broker.queue_stats import QueueSnapshot
    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.outcome import CommittedJob
    from shiwu_worker.runtime.progress import LoadReport
    from shiwu_worker.telemetry.gpu_monitor import GpuState

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_REASONS: Final = ("full", "free", "closing")
LIMITS: Final = ("idle", "device", "fetch", "decode")
_LANES: Final = tuple(lane.value for lane in Lane)
_STAGES: Final = tuple(stage.value for stage in Stage)
_TIMED: Final = len(_STAGES) - 1
"""Stages that the answer tells of: all but the last, commit."""


class _CallbackMetric(Collector):
    """One number that somebody else knows; there is no series while they know none."""

    def __init__(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        read: Callable[[], float | None],
    ) -> None:
        self._family, self._name, self._text, self._read = family, name, text, read

    def describe(self) -> Iterator[Metric]:
        """Its name, without asking."""
        yield self._family(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        """What they say now."""
        if (value := self._read()) is not None:
            yield self._family(self._name, self._text, value=value)


class Metrics:
    """The worker's numbers. Thread-safe; every method is cheap and none waits.

    Args:
        retried: codes that a job may be given back with.
    """

    def __init__(self, *, retried: Collection[ErrorCode]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs; a second series for each that nobody asks for
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        every: Any = {"registry": registry}
        self._jobs = Counter("shiwu_jobs", "Answers given.", ["lane", "status", "code"], **every)
        self._discarded = Counter("shiwu_answers_discarded", "Answers that somebody had given before.", **every)
        self._retries = Counter("shiwu_retries", "Jobs given back to be tried later.", ["code"], **every)
        self._batches = Counter("shiwu_batches", "Batches, by why they left.", ["reason"], **every)
        self._batch_size = Histogram(
            "shiwu_batch_size", "Pictures in a batch.", buckets=tuple(map(float, BATCH_SIZES)), **every
        )
        self._renewed = Counter("shiwu_leases_renewed", "Leases prolonged.", **every)
        self._reaped = Counter("shiwu_leases_reaped", "Jobs taken back from workers whose leases ended.", **every)
        self._limits = Gauge(
            "shiwu_limit_ratio", "Share of the last half minute: what the worker waited for.", ["what"], **every
        )
        self._queues = QueueCollector()
        registry.register(self._queues)
        self._redis_up: float | None = None
        registry.register(
            _CallbackMetric(
                GaugeMetricFamily, "shiwu_redis_up", "1 while Redis answers this process.", lambda: self._redis_up
            )
        )
        lanes: Any = {"label": "lane", "values": _LANES, "buckets": LONG_SECONDS}
        self._stages = BatchHistogram(
            "shiwu_stage_seconds", "Time of a job in each stage.", label="stage", values=_STAGES, buckets=SECONDS
        )
        self._waits = BatchHistogram("shiwu_queue_wait_seconds", "Time of a job in its lane.", **lanes)
        self._answers = BatchHistogram("shiwu_answer_seconds", "From enqueueing to the answer.", **lanes)
        for each in (self._stages, self._waits, self._answers):
            registry.register(each)
        self._show_zeros(retried)

    def _show_zeros(self, retried: Collection[ErrorCode]) -> None:
        """A series that begins with its first event hides that event from `rate`; and "no answer" is a number too."""
        for lane in _LANES:
            self._jobs.labels(lane, Status.TAGGED.value, "")
        for code in sorted(retried):
            self._retries.labels(code.value)
        for reason in BATCH_REASONS:
            self._batches.labels(reason)

    # -------------------------------------------------------------------------------- jobs
    def answered(self, settled: Sequence[CommittedJob]) -> None:
        """Record answers, a whole commit at a time."""
        if not settled:
            return
        answers = [one.entry.answer for one in settled]
        # Columns: queue, the stages in their order, total; a queue time that nobody knows is NaN.
        times = np.array([msgspec.structs.astuple(one.timing) for one in answers], np.float64) / 1000
        lanes = np.array([one.lane is Lane.BULK for one in answers], np.intp)
        commit_s = np.array([one.commit_s for one in settled])
        spent = np.column_stack((times[:, 1 : 1 + _TIMED], commit_s))
        # A stage that a job never reached has taken no time and tells nothing.
        spent[spent <= 0] = np.nan
        self._stages.observe(np.tile(np.arange(_TIMED + 1), len(answers)), spent.ravel())
        self._waits.observe(lanes, times[:, 0])
        # Without a queue time the total is only that of the worker.
        self._answers.observe(lanes, np.where(np.isnan(times[:, 0]), np.nan, times[:, -1] + commit_s))
        if late := sum(not one.is_first for one in settled):
            self._discarded.inc(late)
        # Last, and first in the text: a page that tells of a job tells of its times too.
        outcomes = Tally((one.lane, one.status, one.error.code if one.error is not None else None) for one in answers)
        for (lane, status, code), count in outcomes.items():
            self._jobs.labels(lane or "", str(status), code or "").inc(count)

    def retried(self, jobs: Sequence[Job]) -> None:
        """Record the jobs among these that failed and are tried again."""
        for job in jobs:
            if job.back is not None and job.error is not None:
                self._retries.labels(str(job.error.code)).inc()

    def batch(self, reason: str, size: int) -> None:
        """Record a batch: `full`, `free` (the device was) or `closing`."""
        self._batches.labels(reason).inc()
        self._batch_size.observe(size)

    # -------------------------------------------------------------------------------- what others saw
    def renewed(self, leases: int) -> None:
        """Leases of this worker were prolonged."""
        self._renewed.inc(leases)

    def reaped(self, jobs: int) -> None:
        """This worker took jobs back from the dead."""
        self._reaped.inc(jobs)

    def load(self, load: LoadReport) -> None:
        """Where the time went lately."""
        for what in LIMITS:
            self._limits.labels(what).set(getattr(load, what))

    def queues(self, seen: QueueSnapshot, backlog_s: dict[Lane, float]) -> None:
        """Record the state of the queues, which also shows that Redis answers."""
        self._queues.update(
            QueueNumbers(
                waiting=seen.waiting,
                claimed=seen.claimed,
                oldest_age_s={lane: max(0.0, seen.at_ms - sent_ms) / 1000 for lane, sent_ms in seen.oldest_ms.items()},
                delayed=seen.delayed,
                dead=seen.dead,
                backlog_s=backlog_s,
            )
        )
        self._redis_up = 1.0

    def redis_unreachable(self) -> None:
        """Redis did not answer: the state of the queues is unknown until it does."""
        self._queues.forget()
        self._redis_up = 0.0

    def model(self, info: ModelInfo) -> None:
        """What this worker runs."""
        labels = ("model", "revision", "dtype", "device")
        gauge = Gauge("shiwu_model_info", "The model of this worker; always 1.", labels, registry=self.registry)
        gauge.labels(info.id, info.revision, info.dtype, info.device).set(1)

    def sizes(self, *, largest: Callable[[], int], threads: Callable[[], int]) -> None:
        """Ask these for the largest batch, and for the model's threads on a CPU, as they are now."""
        batch = Gauge(
            "shiwu_batch_size_largest", "Largest batch, as the worker chooses it now.", registry=self.registry
        )
        batch.set_function(largest)
        cpu = Gauge("shiwu_model_threads", "Threads of the model on a CPU; 1 on a GPU.", registry=self.registry)
        cpu.set_function(threads)

    def gpu(self, look: Callable[[], GpuState | None]) -> None:
        """Ask this for the card's state at each scrape; None gives no series."""

        def field(name: str) -> Callable[[], float | None]:
            return lambda: getattr(look(), name, None)

        for name, text, read in (
            ("shiwu_gpu_memory_used_bytes", "Memory in use on the card, by all its processes.", field("used_bytes")),
            ("shiwu_gpu_memory_total_bytes", "Memory of the card.", field("total_bytes")),
            ("shiwu_gpu_utilisation_ratio", "Share of the time in which the card was busy.", field("utilisation")),
        ):
            self.registry.register(_CallbackMetric(GaugeMetricFamily, name, text, read))

    def loader_restarts(self, read: Callable[[], int]) -> None:
        """Ask this for how many loaders were replaced."""
        asked = _CallbackMetric(
            CounterMetricFamily, "shiwu_loader_restarts", "Loader processes that were replaced.", read
        )
        self.registry.register(asked)

    def state(self, *, is_ready: Callable[[], bool], age_s: Callable[[], float]) -> None:
        """Ask these for whether the worker is ready, and for how long nothing has moved."""
        ready = Gauge("shiwu_worker_ready", "1 while the worker is ready for jobs.", registry=self.registry)
        ready.set_function(lambda: float(is_ready()))
        age = Gauge("shiwu_progress_age_seconds", "Time since anything moved.", registry=self.registry)
        age.set_function(age_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
