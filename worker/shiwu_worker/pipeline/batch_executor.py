"""Encode and score of one batch, so that no picture costs its neighbours their answer.

Out of memory: halves, and no later batch is as large. Vectors that are not numbers, or too few: one by one in FP32. A
lost device: nothing here helps, the process ends. Anything else: halves, until the guilty picture stands alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, WrongVectors

if TYPE_CHECKING:
    from numpy import float32, uint8
    from numpy.typing import NDArray

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels
    from shiwu_worker.stages.encode.encoder import InFlightBatch

log: Any = structlog.get_logger()


class Learn(Protocol):
    """Told a batch that was collected, and the CPU of the host that it took beside the model."""

    def __call__(self, flight: InFlightBatch, *, host_s: float) -> None:
        """Learn from it."""


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """A batch on its way through the device: its jobs in the order of its rows, and what the device holds of it."""

    jobs: tuple[Job, ...]
    started_s: float
    flight: InFlightBatch | None = None
    error: Exception | None = None
    """Why it did not take off."""

    @property
    def is_under_way(self) -> bool:
        """Whether the device still works on it, or has not been asked yet."""
        return self.flight is not None and self.flight.is_under_way

    def wait(self) -> None:
        """Wait until the device is done with it."""
        if self.flight is not None:
            self.flight.wait()


class BatchExecutor:
    """Gives every job of a batch its tags or the reason why it has none. One thread uses it.

    Args:
        encode_labels: label set → the set with its vectors; new labels pass the text tower.
        pixels: uint8 (slots, h, w, 3), where the loaders write.
        launch: rows of `pixels` → a batch on the device; `collect` gives its unit vectors.
        encode_exact: pixels → unit vectors in FP32, at once.
        score: gives jobs their tags; raises WrongVectors for a wrong number of vectors.
        trouble: what an error of the device means.
        lower_cap: told the largest batch that may still fit.
        learn: told each batch that went well, and the CPU that scoring it took.
    """

    def __init__(
        self,
        *,
        encode_labels: Callable[[LabelSet], EncodedLabels],
        pixels: NDArray[uint8],
        launch: Callable[[NDArray[uint8], Sequence[int]], InFlightBatch],
        collect: Callable[[InFlightBatch], NDArray[float32]],
        encode_exact: Callable[[NDArray[uint8]], NDArray[float32]],
        score: Callable[[Sequence[Job], NDArray[float32]], None],
        error_kind: Callable[[BaseException], DeviceErrorKind],
        lower_cap: Callable[[int], None],
        learn: Learn = lambda *_, **__: None,
    ) -> None:
        self._encode_labels = encode_labels
        self._pixels = pixels
        self._launch = launch
        self._collect = collect
        self._encode_exact = encode_exact
        self._score = score
        self._error_kind = error_kind
        self._lower_cap = lower_cap
        self._learn = learn

    def launch(self, jobs: Sequence[Job]) -> LaunchedBatch:
        """Start a batch, without the jobs whose labels fail. An error waits for `finish`.

        Raises:
            FatalError: with ExitCode.DEVICE, when no later batch can succeed in this process.
        """
        live = tuple(job for job in jobs if self._has_labels(job))
        started_s = time.monotonic()
        if not live:
            return LaunchedBatch((), started_s)
        try:
            flight = self._launch(self._pixels, [job.slot for job in live])
        except Exception as error:  # noqa: BLE001 border: `finish` judges it
            return LaunchedBatch(live, started_s, error=error)
        return LaunchedBatch(live, started_s, flight)

    def finish(self, launched: LaunchedBatch) -> None:
        """Wait for the vectors and score them; whatever goes wrong, each job gets its tags or its own error.

        Raises:
            FatalError: with ExitCode.DEVICE, when no later batch can succeed in this process.
        """
        if not launched.jobs:
            return
        cpu_from_s = time.thread_time()
        is_well = self._checked(launched.jobs, lambda: self._fast_vectors(launched), launched.started_s)
        if is_well and launched.flight is not None:
            self._learn(launched.flight, host_s=time.thread_time() - cpu_from_s)

    def _has_labels(self, job: Job) -> bool:
        """Look the label vectors up, or fail the job alone: words that fail are not the pictures' fault."""
        if job.label_set is None:
            return True
        try:
            job.labels = self._encode_labels(job.label_set)
            job.label_set = job.labels.label_set
        except Exception as error:  # border: whatever the model raises is judged here
            error_kind = self._error_kind(error)
            if error_kind is DeviceErrorKind.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
            is_memory = error_kind is DeviceErrorKind.OUT_OF_MEMORY
            code = ErrorCode.OUT_OF_MEMORY if is_memory else ErrorCode.ENCODE_FAILED
            text = f"the model failed on these labels ({type(error).__name__}: {error!s:.200})"
            job.fail(ErrorInfo(code=code, message=text, stage=Stage.SCORE, retryable=is_memory))
            return False
        return True

    def _fast_vectors(self, launched: LaunchedBatch) -> NDArray[float32]:
        if launched.flight is None:
            raise launched.error or RuntimeError("expected a batch that took off, or the reason why it did not")
        return self._collect(launched.flight)

    def _again(self, jobs: Sequence[Job]) -> None:
        if jobs:
            slots = [job.slot for job in jobs]
            self._checked(jobs, lambda: self._collect(self._launch(self._pixels, slots)), time.monotonic())

    def _checked(self, jobs: Sequence[Job], vectors: Callable[[], NDArray[float32]], started_s: float) -> bool:
        """Score a batch, whatever its errors ask for; whether there were none."""
        try:
            self._score_all(jobs, vectors(), started_s)
        except WrongVectors as error:
            log.warning("batch_vectors_invalid", size=len(jobs), error=str(error)[:300])
            guilty = {jobs[row].id for row in error.rows} or {job.id for job in jobs}
            for job in jobs:
                if job.id in guilty:
                    self._alone(job)
            self._again([job for job in jobs if job.id not in guilty])
        except Exception as error:  # noqa: BLE001 border: whatever the model or the device raises is judged here
            self._check(error, jobs)
        else:
            return True
        return False

    def _score_all(self, jobs: Sequence[Job], vectors: NDArray[float32], started_s: float) -> None:
        encoded_s = time.monotonic()
        for job in jobs:
            job.moments.encode_from_s, job.moments.score_from_s = started_s, encoded_s
            job.batch_size = len(jobs)
        self._score(jobs, vectors)
        scored_s = time.monotonic()
        for job in jobs:
            job.scored_s = scored_s

    def _check(self, error: Exception, jobs: Sequence[Job]) -> None:
        error_kind = self._error_kind(error)
        if error_kind is DeviceErrorKind.LOST:
            raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
        log.warning("batch_failed", size=len(jobs), error=str(error)[:300], kind=type(error).__name__)
        half = len(jobs) // 2
        if error_kind is DeviceErrorKind.OUT_OF_MEMORY and half:
            self._lower_cap(half)
            log.warning("batch_size_lowered", largest=half, reason="the device ran out of memory")
        if half:
            self._again(jobs[:half])
            self._again(jobs[half:])
        elif error_kind is DeviceErrorKind.OUT_OF_MEMORY:
            text = "the device ran out of memory with this picture alone; something else uses it, or it is too small"
            jobs[0].fail(ErrorInfo(code=ErrorCode.OUT_OF_MEMORY, message=text, stage=Stage.ENCODE, retryable=True))
        else:
            _blame(jobs[0], error)

    def _alone(self, job: Job) -> None:
        started_s = time.monotonic()
        try:
            self._score_all([job], self._encode_exact(self._pixels[[job.slot]]), started_s)
        except Exception as error:  # border: as in `_judged`
            if self._error_kind(error) is DeviceErrorKind.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
            _blame(job, error)


def _blame(job: Job, error: Exception) -> None:
    text = f"the model failed on this picture ({type(error).__name__}: {error!s:.200})"
    job.fail(ErrorInfo(code=ErrorCode.ENCODE_FAILED, message=text, stage=Stage.ENCODE))
