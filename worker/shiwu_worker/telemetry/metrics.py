"""Metrics of the worker for Prometheus: every name, unit and label.

Labels come from closed sets: lanes, statuses, error codes, stages. The commit thread records jobs, many at a time. The
state of queues and GPU is kept from the last update of its monitor, so that a scrape never waits for Redis or NVML.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

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
    from shiwu_worker.jobs.outcome import CommittedJob, Released
    from shiwu_worker.runtime.progress import LoadReport
    from shiwu_worker.telemetry.gpu_monitor import GpuState

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_REASONS: Final = ("full", "free", "closing")
HEARTBEAT_DUTIES: Final = ("foreign_values", "leases", "watchers", "maintenance", "trim", "load_log", "worker_state")
DUTIES: Final = (*HEARTBEAT_DUTIES, "gpu", "queue_metrics")
"""Those of the heartbeat, and those of the queue monitor."""
LIMITS: Final = ("idle", "device", "fetch", "decode")
SAVINGS: Final = ("joined", "vector", "not_modified")
_LANES: Final = tuple(lane.value for lane in Lane)
NO_LANE: Final = "none"
"""In place of a lane: labels of configured sets that no job waits for."""
RELOADS: Final = ("done", "failed")
"""How a reload of label sets ends."""
SHADOW_RESULTS: Final = ("same", "changed", "first", "dropped")
SHADOW_CHANGES: Final = ("same", "added", "removed")
_LABEL_LANES: Final = (*_LANES, NO_LANE)
_STAGES: Final = tuple(stage.value for stage in Stage)
_TIMED: Final = len(_STAGES) - 1
"""Number of stages whose duration is in the answer: all but the last, commit."""


def _value_of(read: Callable[[], Mapping[Lane | None, int]], lane: Lane | None) -> float:
    return float(read()[lane])


class _CallbackMetric(Collector):
    """A metric whose value a function returns at each scrape; None gives no series."""

    def __init__(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        read: Callable[[], float | None],
    ) -> None:
        self._family, self._name, self._text, self._read = family, name, text, read

    def describe(self) -> Iterator[Metric]:
        """Return the name without a value."""
        yield self._family(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        """Return the present value."""
        if (value := self._read()) is not None:
            yield self._family(self._name, self._text, value=value)


class Metrics:
    """The metrics of one worker. Thread-safe; every method is cheap and none blocks.

    Args:
        retried: error codes with which jobs are retried; each gets a series with 0.
    """

    _shard_away: Gauge | None = None

    def __init__(self, *, retried: Collection[ErrorCode]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped; without it each counter has a second series
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        self._jobs = counter("shiwu_jobs", "Answers given.", ["lane", "status", "code"])
        self._discarded = counter(
            "shiwu_answers_discarded", "Answers that were discarded: the job had been answered before."
        )
        self._retries = counter("shiwu_retries", "Jobs released for a retry.", ["code"])
        self._batches = counter("shiwu_batches", "Batches, by why they left.", ["reason"])
        self._batch_size = Histogram(
            "shiwu_batch_size", "Images in a batch.", buckets=tuple(map(float, BATCH_SIZES)), registry=registry
        )
        self._open_labels(counter)
        self._renewed = counter("shiwu_leases_renewed", "Leases renewed.")
        self._reaped = counter("shiwu_leases_reaped", "Jobs requeued after their lease expired.")
        self._duty_failures = counter(
            "shiwu_duty_failures", "Failures of the periodic duties of this worker.", ["duty"]
        )
        text = "Values of a wrong type moved away from keys of shiwu."
        self._foreign_moved = counter("shiwu_foreign_values_moved", text)
        text = "Images that were not encoded, because the vector of the same image was known."
        self._saved = counter("shiwu_images_saved", text, ["by"])
        self._limits = Gauge(
            "shiwu_limit_ratio",
            "Share of the last half minute: what the worker waited for.",
            ["what"],
            registry=registry,
        )
        self._queues = QueueCollector()
        registry.register(self._queues)
        self._redis_up: float | None = None
        registry.register(
            _CallbackMetric(
                GaugeMetricFamily, "shiwu_redis_up", "1 while Redis answers this process.", lambda: self._redis_up
            )
        )
        by_lane = partial(BatchHistogram, label="lane", values=_LANES, buckets=LONG_SECONDS)
        self._stages = BatchHistogram(
            "shiwu_stage_seconds", "Time of a job in each stage.", label="stage", values=_STAGES, buckets=SECONDS
        )
        self._waits = by_lane("shiwu_queue_wait_seconds", "Time of a job in its lane.")
        self._answers = by_lane("shiwu_answer_seconds", "From enqueueing to the answer.")
        for each in (self._stages, self._waits, self._answers):
            registry.register(each)
        self._show_zeros(retried)

    def _open_labels(self, counter: Callable[[str, str, list[str]], Counter]) -> None:
        """Create what tells of labels."""
        self._words = counter("shiwu_labels_encoded", "Labels encoded, by the lane that needed them.", ["lane"])
        self._words_s = counter(
            "shiwu_label_seconds", "Time of the device for labels, by the lane that needed them.", ["lane"]
        )
        self._label_sets = Gauge(
            "shiwu_label_set_info", "The configured label sets; always 1.", ["name", "digest"], registry=self.registry
        )
        self._label_set_series: set[tuple[str, str]] = set()
        self._reloads = counter("shiwu_label_reloads", "Changed files of label sets.", ["result"])
        text = "Images tried with the shadow label set, by what it changes."
        self._shadow_images = counter("shiwu_shadow_images", text, ["result"])
        text = "Tags of these images, by what the shadow label set changes."
        self._shadow_tags = counter("shiwu_shadow_tags", text, ["change"])

    def _show_zeros(self, retried: Collection[ErrorCode]) -> None:
        """Create series with 0: a series that begins with its first event hides that event from `rate`."""
        for lane in _LANES:
            self._jobs.labels(lane, Status.TAGGED.value, "")
        for name in _LABEL_LANES:
            self._words.labels(name)
            self._words_s.labels(name)
        for code in sorted(retried):
            self._retries.labels(code.value)
        for reason in BATCH_REASONS:
            self._batches.labels(reason)
        for by in SAVINGS:
            self._saved.labels(by)
        for duty in DUTIES:
            self._duty_failures.labels(duty)
        for result in RELOADS:
            self._reloads.labels(result)
        for result in SHADOW_RESULTS:
            self._shadow_images.labels(result)
        for change in SHADOW_CHANGES:
            self._shadow_tags.labels(change)

    # -------------------------------------------------------------------------------- jobs
    def answered(self, committed: Sequence[CommittedJob]) -> None:
        """Record the answers of one commit."""
        if not committed:
            return
        answers = [one.entry.answer for one in committed]
        # Columns: queue, the stages in their order, total; an unknown queue wait is NaN.
        times = np.array([msgspec.structs.astuple(one.timing) for one in answers], np.float64) / 1000
        lanes = np.array([one.lane is Lane.BULK for one in answers], np.intp)
        commit_s = np.array([one.commit_s for one in committed])
        spent = np.column_stack((times[:, 1 : 1 + _TIMED], commit_s))
        # A stage that a job did not reach has 0 s and is not counted.
        spent[spent <= 0] = np.nan
        self._stages.observe(np.tile(np.arange(_TIMED + 1), len(answers)), spent.ravel())
        self._waits.observe(lanes, times[:, 0])
        # Without a queue wait the total covers the worker only.
        self._answers.observe(lanes, np.where(np.isnan(times[:, 0]), np.nan, times[:, -1] + commit_s))
        if discarded := sum(not one.is_first for one in committed):
            self._discarded.inc(discarded)
        # Last, so that a scrape that counts a job has its durations too.
        outcomes = Tally((one.lane, one.status, one.error.code if one.error is not None else None) for one in answers)
        for (lane, status, code), count in outcomes.items():
            self._jobs.labels(lane or "", str(status), code or "").inc(count)

    def retried(self, released: Sequence[Released]) -> None:
        """Record the jobs among these that failed and get another attempt."""
        for each in released:
            if each.job.error is not None:
                self._retries.labels(str(each.job.error.code)).inc()

    def batch(self, reason: str, size: int) -> None:
        """Record a batch; `reason` is `full`, `free` (the device was) or `closing`."""
        self._batches.labels(reason).inc()
        self._batch_size.observe(size)

    # -------------------------------------------------------------------------------- what other parts report
    def labels_encoded(self, lane: Lane | None, *, words: int, seconds: float) -> None:
        """Record labels that the device encoded; None where no job waits for them."""
        name = lane.value if lane is not None else NO_LANE
        self._words.labels(name).inc(words)
        self._words_s.labels(name).inc(seconds)

    def label_sets(self, digests: Mapping[str, str], *, is_done: bool | None) -> None:
        """Record the configured label sets, and the end of a reload; None where there was none."""
        if is_done is not None:
            self._reloads.labels(RELOADS[0] if is_done else RELOADS[1]).inc()
        now = set(digests.items())
        for series in now:
            self._label_sets.labels(*series).set(1)
        for series in self._label_set_series - now:
            self._label_sets.remove(*series)
        self._label_set_series = now

    def shadow_compared(self, images: Mapping[str, int], tags: Mapping[str, int]) -> None:
        """Record images by one of `SHADOW_RESULTS`, and tags by one of `SHADOW_CHANGES`."""
        for result, count in images.items():
            self._shadow_images.labels(result).inc(count)
        for change, count in tags.items():
            self._shadow_tags.labels(change).inc(count)

    def images_saved(self, by: str, images: int) -> None:
        """Record jobs that were scored without encoding their images; `by` is one of `SAVINGS`."""
        self._saved.labels(by).inc(images)

    def renewed(self, leases: int) -> None:
        """Record renewed leases of this worker."""
        self._renewed.inc(leases)

    def reaped(self, jobs: int) -> None:
        """Record jobs that this worker requeued after their lease expired."""
        self._reaped.inc(jobs)

    def duty_failed(self, name: str) -> None:
        """Record a failure of one of the periodic duties."""
        self._duty_failures.labels(name).inc()

    def foreign_moved(self, values: int) -> None:
        """Count values of a wrong type that were moved away from the keys of shiwu."""
        self._foreign_moved.inc(values)

    def load(self, load: LoadReport) -> None:
        """Record what the worker waited for in the last half minute."""
        for what in LIMITS:
            self._limits.labels(what).set(getattr(load, what))

    def queues(self, snapshot: QueueSnapshot, backlog_s: dict[Lane, float]) -> None:
        """Record the state of the queues, which also shows that Redis answers."""
        self._queues.update(
            QueueNumbers(
                waiting=snapshot.waiting,
                claimed=snapshot.claimed,
                oldest_age_s={
                    lane: max(0.0, snapshot.at_ms - sent_ms) / 1000 for lane, sent_ms in snapshot.oldest_ms.items()
                },
                delayed=snapshot.delayed,
                dead=snapshot.dead,
                backlog_s=backlog_s,
            )
        )
        self._redis_up = 1.0

    def redis_unreachable(self) -> None:
        """Record that Redis did not answer; the state of the queues is not exported until it does."""
        self._queues.forget()
        self._redis_up = 0.0

    def shards(self, count: int) -> None:
        """Create the series of so many shards."""
        text = "1 while this worker gets no answer from the shard."
        self._shard_away = Gauge("shiwu_shard_away", text, ["shard"], registry=self.registry)
        for shard in range(count):
            self._shard_away.labels(shard)

    def shard_away(self, shard: int, *, is_away: bool) -> None:
        """Record whether a shard answers."""
        if self._shard_away is not None:
            self._shard_away.labels(shard).set(float(is_away))

    def model(self, info: ModelInfo) -> None:
        """Record the model that this worker runs."""
        labels = ("model", "revision", "dtype", "device")
        gauge = Gauge("shiwu_model_info", "The model of this worker; always 1.", labels, registry=self.registry)
        gauge.labels(info.id, info.revision, info.dtype, info.device).set(1)

    def sizes(self, *, largest: Callable[[], int], threads: Callable[[], int]) -> None:
        """Read the largest batch size, and the threads of the model on a CPU, from these functions at each scrape."""
        batch = Gauge("shiwu_batch_size_largest", "Largest batch that the worker makes now.", registry=self.registry)
        batch.set_function(largest)
        cpu = Gauge("shiwu_model_threads", "Threads of the model on a CPU; 1 on a GPU.", registry=self.registry)
        cpu.set_function(threads)

    def gpu(self, state: Callable[[], GpuState | None]) -> None:
        """Read the state of the GPU from this function at each scrape; None gives no series."""

        def field(name: str) -> Callable[[], float | None]:
            return lambda: getattr(state(), name, None)

        for name, text, read in (
            ("shiwu_gpu_memory_used_bytes", "Memory in use on the GPU, by all processes.", field("used_bytes")),
            ("shiwu_gpu_memory_total_bytes", "Memory of the GPU.", field("total_bytes")),
            ("shiwu_gpu_utilisation_ratio", "Share of the time in which the GPU was busy.", field("utilisation")),
        ):
            self.registry.register(_CallbackMetric(GaugeMetricFamily, name, text, read))

    def words_waiting(self, read: Callable[[], Mapping[Lane | None, int]]) -> None:
        """Read the labels that are to be encoded, by lane, from this function at each scrape."""
        gauge = Gauge("shiwu_labels_waiting", "Labels that are to be encoded.", ["lane"], registry=self.registry)
        for lane in (*Lane, None):
            series = gauge.labels(lane.value if lane is not None else NO_LANE)
            series.set_function(partial(_value_of, read, lane))

    def loader_restarts(self, read: Callable[[], int]) -> None:
        """Read the number of replaced loaders from this function at each scrape."""
        restarts = _CallbackMetric(
            CounterMetricFamily, "shiwu_loader_restarts", "Loader processes that were replaced.", read
        )
        self.registry.register(restarts)

    def state(self, *, is_ready: Callable[[], bool], age_s: Callable[[], float]) -> None:
        """Read readiness, and the seconds of work without progress, from these functions at each scrape."""
        ready = Gauge("shiwu_worker_ready", "1 while the worker is ready for jobs.", registry=self.registry)
        ready.set_function(lambda: float(is_ready()))
        age = Gauge("shiwu_progress_age_seconds", "Time with work and without progress.", registry=self.registry)
        age.set_function(age_s)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
