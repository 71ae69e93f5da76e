"""Encode and score of one batch, so that no picture costs its neighbours their answer.

Out of memory: halves, and no later batch is as large. Vectors that are not numbers, or too few: one by one in FP32. A
lost device: nothing here helps, the process ends. Anything else: halves, until the guilty picture stands alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import ExitCode, FatalError, Trouble, WrongVectors

if TYPE_CHECKING:
    from numpy import float32, uint8
    from numpy.typing import NDArray

    from shiwu_worker.job import Job
    from shiwu_worker.labels import LabelSet

    Encode = Callable[[NDArray[uint8]], NDArray[float32]]

log: Any = structlog.get_logger()


class Triage:
    """Gives every job of a batch its tags or the reason why it has none. One thread uses it.

    Args:
        vectors_of: label set → unit vectors of its words; new words pass the text tower.
        pixels: uint8 (slots, h, w, 3), where the loaders write.
        encode, encode_exact: pixels → unit vectors, in the fast dtype and in FP32.
        score: gives jobs their tags; raises WrongVectors for a wrong number of vectors.
        trouble: what an error of the device means.
        lower_cap: told the largest batch that may still fit.
    """

    def __init__(
        self,
        *,
        vectors_of: Callable[[LabelSet], NDArray[float32]],
        pixels: NDArray[uint8],
        encode: Encode,
        encode_exact: Encode,
        score: Callable[[Sequence[Job], NDArray[float32]], None],
        trouble: Callable[[BaseException], Trouble],
        lower_cap: Callable[[int], None],
    ) -> None:
        self._vectors_of = vectors_of
        self._pixels = pixels
        self._encode = encode
        self._encode_exact = encode_exact
        self._score = score
        self._trouble = trouble
        self._lower_cap = lower_cap

    def run(self, jobs: Sequence[Job]) -> None:
        """Encode and score a batch.

        Raises:
            FatalError: with ExitCode.DEVICE, when no later batch can succeed in this process.
        """
        self._halve([job for job in jobs if self._has_labels(job)])

    def _has_labels(self, job: Job) -> bool:
        """Look the label vectors up, or fail the job alone: words that fail are not the pictures' fault."""
        if job.label_set is None:
            return True
        try:
            job.label_vectors = self._vectors_of(job.label_set)
        except Exception as error:
            trouble = self._trouble(error)
            if trouble is Trouble.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
            is_memory = trouble is Trouble.OUT_OF_MEMORY
            code = ErrorCode.OUT_OF_MEMORY if is_memory else ErrorCode.ENCODE_FAILED
            text = f"the model failed on these labels ({type(error).__name__}: {error!s:.200})"
            job.fail(ErrorInfo(code=code, message=text, stage=Stage.SCORE, retryable=is_memory))
            return False
        return True

    def _halve(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            self._pass(jobs, self._encode)
        except WrongVectors as error:
            log.warning("batch_wrong", size=len(jobs), error=str(error)[:300])
            guilty = {jobs[row].id for row in error.rows} or {job.id for job in jobs}
            for job in jobs:
                if job.id in guilty:
                    self._alone(job)
            if rest := [job for job in jobs if job.id not in guilty]:
                self._halve(rest)
        except Exception as error:  # noqa: BLE001 border: whatever the model or the device raises is judged here
            self._judge(error, jobs)

    def _pass(self, jobs: Sequence[Job], encode: Encode) -> None:
        started_s = time.monotonic()
        vectors = encode(self._pixels[[job.slot for job in jobs]])
        encoded_s = time.monotonic()
        for job in jobs:
            job.moments.encode_from_s, job.moments.score_from_s = started_s, encoded_s
            job.batch_size = len(jobs)
        self._score(jobs, vectors)
        scored_s = time.monotonic()
        for job in jobs:
            job.scored_s = scored_s

    def _judge(self, error: Exception, jobs: Sequence[Job]) -> None:
        trouble = self._trouble(error)
        if trouble is Trouble.LOST:
            raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
        log.warning("batch_failed", size=len(jobs), error=str(error)[:300], kind=type(error).__name__)
        half = len(jobs) // 2
        if trouble is Trouble.OUT_OF_MEMORY and half:
            self._lower_cap(half)
            log.warning("batches_smaller", largest=half, reason="the device ran out of memory")
        if half:
            self._halve(jobs[:half])
            self._halve(jobs[half:])
        elif trouble is Trouble.OUT_OF_MEMORY:
            text = "the device ran out of memory with this picture alone; something else uses it, or it is too small"
            jobs[0].fail(ErrorInfo(code=ErrorCode.OUT_OF_MEMORY, message=text, stage=Stage.ENCODE, retryable=True))
        else:
            _blame(jobs[0], error)

    def _alone(self, job: Job) -> None:
        try:
            self._pass([job], self._encode_exact)
        except Exception as error:  # border: as in `run`
            if self._trouble(error) is Trouble.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
            _blame(job, error)


def _blame(job: Job, error: Exception) -> None:
    text = f"the model failed on this picture ({type(error).__name__}: {error!s:.200})"
    job.fail(ErrorInfo(code=ErrorCode.ENCODE_FAILED, message=text, stage=Stage.ENCODE))
