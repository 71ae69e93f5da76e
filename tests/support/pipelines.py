"""A pipeline over a real Redis, whose loaders take no time and whose model does what a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import redis

from shiwu_worker.errors import DeviceErrorKind, FatalError
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.loaders.protocol import Loaded, LoadResult, LoadTask
from shiwu_worker.loaders.shared_memory import KnownImages
from shiwu_worker.pipeline.admission import Admission
from shiwu_worker.pipeline.batch_executor import LaunchedBatch
from shiwu_worker.pipeline.claimer import Claimer
from shiwu_worker.pipeline.in_flight import InFlightJobs
from shiwu_worker.pipeline.label_queue import LabelQueue
from shiwu_worker.pipeline.pipeline import Pipeline, Stages
from shiwu_worker.pipeline.shared_images import SharedImages
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.policy.limits import LABEL_SLOTS, LabelLimits
from shiwu_worker.policy.retry import PipelineLimits
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.stages.batch import Batcher
from shiwu_worker.stages.claim.notifier import LaneNotifier
from shiwu_worker.stages.commit import Committer
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.observers import RecordingObserver
from tests.support.redis_parts import make_answer_store, make_lease_queue

SLOTS: Final = 8
NOTHING_KNOWN: Final = KnownImages(np.zeros(0, np.uint64))
LABELS: Final = LabelSet(None, ("a", "b"))


def _encoded(label_set: LabelSet) -> EncodedLabels:
    return EncodedLabels(label_set, TextVectors(np.ones((len(label_set.words), 1), np.float32)))


class InstantLoaders:
    """Loaders whose results come immediately, on the thread that submits."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        """Called before each result."""
        self._on_loaded: Callable[[Sequence[LoadResult]], None] = lambda _: None

    def subscribe(self, on_loaded: Callable[[Sequence[LoadResult]], None]) -> None:
        """Pass results to this function."""
        self._on_loaded = on_loaded

    def submit(self, tasks: Sequence[LoadTask]) -> None:
        """Load each image in no time."""
        for task in tasks:
            self.before()
            about: dict[str, Any] = {"n_bytes": 1, "format": "PNG", "width": 1, "height": 1}
            digest = f"{task.ticket:064x}"
            self._on_loaded([Loaded(task.ticket, task.slot, 1.0, 1.0, 1.0, **about, sha256=digest)])


def notified_client(client: redis.Redis) -> redis.Redis:
    """A client of the same server whose connections it can notify."""
    address = client.connection_pool.connection_kwargs
    return redis.Redis(host=address["host"], port=address["port"], db=address["db"], protocol=3)


class PipelineUnderTest:
    """All parts of a pipeline; `encode` and `resolve` may be replaced before `start`."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        limits: PipelineLimits | None = None,
        label_bank: LabelBank | None = None,
        label_limits: LabelLimits | None = None,
    ) -> None:
        self.resolve: Callable[[Any], LabelSet] = lambda _: LABELS
        self.encode: Callable[[Sequence[Job]], None] = lambda _: None
        self.fatal: list[FatalError] = []
        self.observer, self.progress = RecordingObserver(), Progress()
        self.lease_queue = make_lease_queue(client, "w", lease_s=30)
        self.answer_store = make_answer_store(client, "w")
        self.notified = notified_client(client)
        self.notifier = LaneNotifier(self.notified)
        self.loaders = InstantLoaders()
        limits = limits or PipelineLimits(slots=SLOTS, max_attempts=3)
        bank: Any = label_bank or SimpleNamespace(
            resolve=lambda labels, _head: self.resolve(labels), known=_encoded, configured=()
        )
        self.labels = LabelQueue(
            bank,
            label_limits or LabelLimits(),
            error_kind=lambda _: DeviceErrorKind.OTHER,
            image_s=lambda: 0.0,
            observer=self.observer,
        )
        self.in_flight = InFlightJobs(
            slots=limits.slots + LABEL_SLOTS,
            label_slots=LABEL_SLOTS,
            waiting=self.labels.waiting_jobs,
        )
        self.committer = Committer(
            self.answer_store,
            worker="w",
            release=self._release,
            backoff=RedisBackoff("commit", max_s=0.1),
            on_fatal=self.fatal.append,
        )
        self.meter = LoadMeter(loader_threads=1)
        admission = Admission(limits, label_bank=bank, callback_rules=CallbackRules())
        self.pipeline = Pipeline(
            self._stages(admission),
            self.in_flight,
            progress=self.progress,
            meter=self.meter,
            observer=self.observer,
            on_fatal=self.fatal.append,
        )

    def _stages(self, admission: Admission) -> Stages:
        executor: Any = SimpleNamespace(launch=lambda jobs: LaunchedBatch(jobs, 1.0), finish=self._finish)
        loaders: Any = self.loaders
        return Stages(
            claimer=Claimer(
                self.lease_queue,
                self.notifier,
                self.in_flight,
                zone=UTC,
                backoff=RedisBackoff("claim", max_s=0.1),
                progress=self.progress,
                meter=self.meter,
                observer=self.observer,
            ),
            admission=admission,
            labels=self.labels,
            loaders=loaders,
            shared=SharedImages(max_vectors=0, known_images=NOTHING_KNOWN),
            batcher=Batcher(max_size=4, bulk_share=0.1),
            check_canary=lambda: None,
            executor=executor,
            committer=self.committer,
        )

    def _release(self, releases: Sequence[Release]) -> int:
        """Looked up at each call, because a test may replace it."""
        return self.lease_queue.release(releases)

    def _finish(self, launched: LaunchedBatch) -> None:
        self.encode(launched.jobs)

    def start(self) -> None:
        """Start all threads, in the order of the service."""
        self.committer.start(on_committed=self.pipeline.committed, on_released=self.pipeline.released)
        self.pipeline.start()

    def stop(self) -> None:
        """Stop all threads, and release what is left."""
        self.lease_queue.release(self.pipeline.stop(grace_s=0.0))
        self.committer.close(timeout_s=5.0)
        self.notified.close()
