"""A pipeline whose stages a test controls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from shiwu.contract import ErrorCode, ErrorInfo, Lane, parse_request
from shiwu_worker.errors import DeviceErrorKind, FatalError
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.jobs.outcome import Outcome
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.loaders.protocol import Loaded, LoadFailed, LoadResult, LoadTask, Recognised
from shiwu_worker.loaders.shared_memory import KnownImages
from shiwu_worker.pipeline.admission import Admission
from shiwu_worker.pipeline.batch_executor import LaunchedBatch
from shiwu_worker.pipeline.in_flight import InFlightJobs
from shiwu_worker.pipeline.label_queue import LabelQueue
from shiwu_worker.pipeline.pipeline import Pipeline, Stages
from shiwu_worker.pipeline.shared_images import SharedImages
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.policy.limits import LabelLimits
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.stages.batch import Batcher
from shiwu_worker.stages.fetch.validators import Validator
from tests.support.observers import RecordingObserver
from tests.support.waiting import wait_until

SLOTS = 6
RETRIED = ErrorCode.SOURCE_UNAVAILABLE
LABELS = LabelSet("x", ("a",))
ENCODED = EncodedLabels(LABELS, TextVectors(np.ones((1, 1), np.float32)))
ABOUT: dict[str, Any] = {"n_bytes": 7, "format": "PNG", "width": 3, "height": 2}
BROKEN = ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut")


class Claims:
    """The claim thread: waits until it is closed, while the test passes jobs on."""

    def __init__(self) -> None:
        self.claimed: Callable[[Sequence[Job]], None] = lambda _: None
        self.reports: list[bool] = []
        self._closed, self._runs = threading.Event(), threading.Event()

    def run(self, on_claimed: Callable[[Sequence[Job]], None]) -> None:
        """Let the test claim."""
        self.claimed = on_claimed
        self._runs.set()
        self._closed.wait(30)

    def wait_running(self) -> None:
        """Wait until `claimed` may be called."""
        assert self._runs.wait(30)

    def close(self) -> None:
        """End `run`."""
        self._closed.set()

    def report(self, *, active: bool) -> None:
        """Keep what is reported."""
        self.reports.append(active)


class Parts:
    """A pipeline whose device waits for `device_free`."""

    def __init__(self, *, max_vectors: int = 0) -> None:
        self.max_vectors, self.slots = max_vectors, SLOTS
        self.claims = Claims()
        self.tasks: list[LoadTask] = []
        self.launched: list[list[str]] = []
        self.outcomes: list[Outcome] = []
        self.fatal: list[FatalError] = []
        self.device_free = threading.Event()
        self.device_free.set()
        self.canary_error: FatalError | None = None
        self.launch_error: Exception | None = None
        self.in_flight = InFlightJobs(slots=SLOTS)
        self.observer = RecordingObserver()
        self.progress = Progress()
        self.meter = LoadMeter(loader_threads=1)
        self.known_images = KnownImages(np.zeros(64, np.uint64))
        self.shared = SharedImages(max_vectors=max_vectors, known_images=self.known_images)
        self.encode_errors: dict[str, ErrorInfo] = {}
        """Job id → the error with which the model fails on its image."""
        self._vectors: dict[str, float] = {}
        self.batcher: Batcher[Job] = Batcher(max_size=SLOTS, bulk_share=0.1)
        self.pipeline = Pipeline(
            self._stages(),
            self.in_flight,
            progress=self.progress,
            meter=self.meter,
            observer=self.observer,
            on_fatal=self.fatal.append,
        )

    def _stages(self) -> Stages:
        retries: dict[str, RetryPolicy] = {RETRIED: RetryPolicy(attempts=2, first_s=1.0, longest_s=1.0)}
        bank: Any = SimpleNamespace(resolve=lambda *_: LABELS, known=lambda _: ENCODED, configured=())
        loaders: Any = SimpleNamespace(subscribe=self._subscribe, submit=self.tasks.extend)
        executor: Any = SimpleNamespace(launch=self._launch, finish=self._finish, score_known=self._score_known)
        committer: Any = SimpleNamespace(put=self.outcomes.extend)
        claims: Any = self.claims
        return Stages(
            claimer=claims,
            admission=Admission(
                PipelineLimits(slots=SLOTS, max_attempts=3, retries=retries),
                label_bank=bank,
                callback_rules=CallbackRules(),
            ),
            labels=LabelQueue(
                bank,
                LabelLimits(),
                error_kind=lambda _: DeviceErrorKind.OTHER,
                image_s=lambda: 0.0,
                observer=self.observer,
            ),
            loaders=loaders,
            shared=self.shared,
            batcher=self.batcher,
            check_canary=self._check_canary,
            executor=executor,
            committer=committer,
        )

    def _subscribe(self, on_loaded: Callable[[Sequence[LoadResult]], None]) -> None:
        self._on_loaded = on_loaded

    def _check_canary(self) -> None:
        if self.canary_error is not None:
            raise self.canary_error

    def _launch(self, jobs: Sequence[Job]) -> LaunchedBatch:
        self.launched.append([job.id for job in jobs])
        assert self.device_free.wait(30)
        if self.launch_error is not None:
            raise self.launch_error
        return LaunchedBatch(jobs, time.monotonic())

    def _finish(self, launched: LaunchedBatch) -> None:
        right = []
        for job in launched.jobs:
            job.moments.score_from_s = time.monotonic()
            if (error := self.encode_errors.get(job.id)) is not None:
                job.fail(error)
            else:
                self._vectors[job.id] = float(len(self._vectors))
                right.append(job)
        if right:
            self.shared.encoded(right, np.array([self.vector_of(job.id) for job in right], np.float32))

    def _score_known(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            assert job.shared_vector is not None
            job.moments.encode_from_s = job.moments.score_from_s = time.monotonic()

    def vector_of(self, job_id: str) -> list[float]:
        """The vector that the model gave this job."""
        return [self._vectors[job_id]]

    def load(
        self, *ids: str, error: ErrorInfo | None = None, sha256: str = "", validator: Validator | None = None
    ) -> None:
        """Report that the images of these jobs were loaded in this order, or failed; they differ without a digest."""
        by_id = {job.id: job for job in self.in_flight.jobs()}
        tickets = {task.slot: task.ticket for task in self.tasks}
        results: list[LoadResult] = []
        for slot in [by_id[job_id].slot for job_id in ids]:
            if error is None:
                digest = sha256 or f"{tickets[slot]:064x}"
                results.append(
                    Loaded(tickets[slot], slot, 1.0, 1.25, 1.75, **ABOUT, sha256=digest, validator=validator)
                )
            else:
                results.append(LoadFailed(tickets[slot], slot, 1.0, 1.25, 1.75, error=error))
        self._on_loaded(results)

    def recognise(self, job_id: str, *, sha256: str, is_modified: bool = True) -> None:
        """Report that the image of this job was fetched, or not even that, and not decoded."""
        n_bytes = 7 if is_modified else None
        [job] = [job for job in self.in_flight.jobs() if job.id == job_id]
        ticket = {task.slot: task.ticket for task in self.tasks}[job.slot]
        self._on_loaded([Recognised(ticket, job.slot, 1.0, 1.25, 1.25, n_bytes=n_bytes, sha256=sha256)])

    def outcome(self, job_id: str) -> Outcome:
        """The only outcome of a job."""
        wait_until(lambda: any(each.job.id == job_id for each in list(self.outcomes)), timeout_s=10)
        [found] = [each for each in self.outcomes if each.job.id == job_id]
        return found


def make_jobs(*ids: str, key: str = Lane.INTERACTIVE.queue, **fields: Any) -> list[Job]:
    """Claimed jobs."""
    request = parse_request({"image": "s3://b/k"})
    return [
        Job(id=job_id, key=key, attempt=1, raw=b"", moments=StageTimestamps(claimed_s=0.0), request=request, **fields)
        for job_id in ids
    ]
