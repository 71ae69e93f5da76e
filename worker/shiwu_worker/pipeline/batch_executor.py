"""Runs encode and score for one batch, so that one image costs no other image of its batch the answer.

Out of memory: the batch is halved, and no later batch is as large. Vectors that are not finite, or too few: the images
are encoded one by one in FP32. A lost device: the process ends. Any other error: the batch is halved until one image is
left, which gets the error. An error of scoring is a defect of the worker and says nothing about the image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, WrongVectors

if TYPE_CHECKING:
    from numpy import float32, uint8
    from numpy.typing import NDArray
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.stages.encode.encoder import Encoder, InFlightBatch
    from shiwu_worker.stages.score.scorer import Scorer

log: FilteringBoundLogger = structlog.get_logger()


class _ScoringFailed(Exception):
    """Scoring raised the error that is the cause of this one."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"scoring failed ({type(error).__name__}: {error!s:.200})")
        self.__cause__ = error


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """A batch between launch and score."""

    jobs: Sequence[Job]
    """Its jobs, in the order of its rows."""
    started_s: float
    in_flight: InFlightBatch | None = None
    error: Exception | None = None
    """Why the device did not take the batch."""

    @property
    def is_under_way(self) -> bool:
        """Whether the device still works on the batch."""
        return self.in_flight is not None and self.in_flight.is_under_way

    def wait(self) -> None:
        """Wait until the device is done with the batch."""
        if self.in_flight is not None:
            self.in_flight.wait()


class BatchExecutor:
    """Gives every job of a batch its tags or its own error.

    The encode thread calls `launch`, and the score thread calls `finish`. `score_known` is thread-safe.

    Args:
        pixels: uint8 (slots, h, w, 3), where the loaders write.
        on_encoded: gets jobs that were scored, and their vectors (n, d), which it must copy to keep them.
    """

    def __init__(
        self,
        encoder: Encoder,
        scorer: Scorer,
        *,
        pixels: NDArray[uint8],
        on_encoded: Callable[[Sequence[Job], NDArray[float32]], None] = lambda *_: None,
    ) -> None:
        self._encoder = encoder
        self._scorer = scorer
        self._pixels = pixels
        self._on_encoded = on_encoded

    def launch(self, jobs: Sequence[Job]) -> LaunchedBatch:
        """Start a batch. An error of the device is handled by `finish`."""
        started_s = time.monotonic()
        try:
            in_flight = self._encoder.launch(self._pixels, [job.slot for job in jobs])
        except Exception as error:  # noqa: BLE001 border: `finish` decides what the error means
            return LaunchedBatch(jobs, started_s, error=error)
        return LaunchedBatch(jobs, started_s, in_flight)

    def finish(self, launched: LaunchedBatch) -> None:
        """Wait for the vectors and score them. Whatever fails, each job then has its tags or its own error.

        Raises:
            FatalError: with ExitCode.DEVICE, when no later batch can succeed in this process.
        """
        cpu_from_s = time.thread_time()
        has_succeeded = self._run(launched.jobs, lambda: self._collect(launched), launched.started_s)
        if has_succeeded and launched.in_flight is not None:
            self._encoder.learn(launched.in_flight, host_s=time.thread_time() - cpu_from_s)

    def score_known(self, jobs: Sequence[Job]) -> None:
        """Score jobs whose vectors are known. Each then has its tags or its own error."""
        now_s = time.monotonic()
        for job in jobs:
            job.moments.encode_from_s = job.moments.score_from_s = now_s
        self._score_known(jobs)
        scored_s = time.monotonic()
        for job in jobs:
            job.scored_s = scored_s

    def _score_known(self, jobs: Sequence[Job]) -> None:
        try:
            vectors = np.stack([job.shared_vector for job in jobs if job.shared_vector is not None])
            self._scorer.score(jobs, vectors)
        except Exception as error:  # noqa: BLE001 border: an error here must not end the thread
            failed, half = _ScoringFailed(error), len(jobs) // 2
            _log_failure(jobs, failed)
            if half:
                self._score_known(jobs[:half])
                self._score_known(jobs[half:])
            else:
                _fail(jobs[0], failed, DeviceErrorKind.OTHER)

    def _collect(self, launched: LaunchedBatch) -> NDArray[float32]:
        if launched.in_flight is None:
            raise launched.error or RuntimeError("expected a batch on the device, or the error that kept it away")
        return self._encoder.collect(launched.in_flight)

    def _run_again(self, jobs: Sequence[Job]) -> None:
        if jobs:
            slots = [job.slot for job in jobs]
            encoder = self._encoder
            self._run(jobs, lambda: encoder.collect(encoder.launch(self._pixels, slots)), time.monotonic())

    def _run(self, jobs: Sequence[Job], vectors: Callable[[], NDArray[float32]], started_s: float) -> bool:
        """Score a batch and handle its errors; True where it had none."""
        try:
            self._score(jobs, vectors(), started_s)
        except WrongVectors as error:
            log.warning("batch_vectors_invalid", size=len(jobs), error=str(error)[:300])
            wrong = {jobs[row].id for row in error.rows} or {job.id for job in jobs}
            for job in jobs:
                if job.id in wrong:
                    self._run_exact(job)
            self._run_again([job for job in jobs if job.id not in wrong])
        except Exception as error:  # noqa: BLE001 border: the model or the device may raise anything
            self._handle(error, jobs)
        else:
            return True
        return False

    def _score(self, jobs: Sequence[Job], vectors: NDArray[float32], started_s: float) -> None:
        encoded_s = time.monotonic()
        for job in jobs:
            job.moments.encode_from_s, job.moments.score_from_s = started_s, encoded_s
            job.batch_size = len(jobs)
        try:
            self._scorer.score(jobs, vectors)
            scored_s = time.monotonic()
            for job in jobs:
                job.scored_s = scored_s
            self._on_encoded(jobs, vectors)
        except WrongVectors:
            raise
        except Exception as error:  # border: whatever scoring raises is not an error of the device
            raise _ScoringFailed(error) from error

    def _handle(self, error: Exception, jobs: Sequence[Job]) -> None:
        kind = self._kind_unless_lost(error)
        _log_failure(jobs, error)
        half = len(jobs) // 2
        if kind is DeviceErrorKind.OUT_OF_MEMORY and half:
            self._encoder.size_policy.lower(half)
            log.warning("batch_size_lowered", largest=half, reason="the device ran out of memory")
        if half:
            self._run_again(jobs[:half])
            self._run_again(jobs[half:])
        else:
            _fail(jobs[0], error, kind)

    def _run_exact(self, job: Job) -> None:
        """Encode one image alone in FP32."""
        started_s = time.monotonic()
        try:
            self._score([job], self._encoder.encode_exact(self._pixels[[job.slot]]), started_s)
        except Exception as error:  # noqa: BLE001 border: as in `_run`
            _fail(job, error, self._kind_unless_lost(error))

    def _kind_unless_lost(self, error: Exception) -> DeviceErrorKind:
        """What an error of the device means.

        Raises:
            FatalError: the device is lost.
        """
        kind = self._encoder.error_kind(error)
        if kind is DeviceErrorKind.LOST:
            raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
        return kind


def _log_failure(jobs: Sequence[Job], error: Exception) -> None:
    """Log an error of a batch; with its traceback where it is a defect that one job has found."""
    kind = type(error.__cause__ if isinstance(error, _ScoringFailed) else error).__name__
    if isinstance(error, _ScoringFailed) and len(jobs) == 1:
        log.error("batch_failed", size=1, error=str(error)[:300], kind=kind, exc_info=error)
    else:
        log.warning("batch_failed", size=len(jobs), error=str(error)[:300], kind=kind)


def _fail(job: Job, error: Exception, kind: DeviceErrorKind) -> None:
    """Give a job that was alone its error."""
    if isinstance(error, _ScoringFailed):
        info = ErrorInfo(code=ErrorCode.INTERNAL_ERROR, message=str(error), stage=Stage.SCORE, retryable=True)
    elif kind is DeviceErrorKind.OUT_OF_MEMORY:
        text = "the device ran out of memory with this picture alone; something else uses it, or it is too small"
        info = ErrorInfo(code=ErrorCode.OUT_OF_MEMORY, message=text, stage=Stage.ENCODE, retryable=True)
    else:
        text = f"the model failed on this picture ({type(error).__name__}: {error!s:.200})"
        info = ErrorInfo(code=ErrorCode.ENCODE_FAILED, message=text, stage=Stage.ENCODE)
    job.fail(info)
