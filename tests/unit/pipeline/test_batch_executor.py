"""When a batch fails, every image gets its own answer and only the failing image has no tags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shiwu.contract import ErrorCode, Lane, Stage
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, NonFiniteError, WrongVectors
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.pipeline.batch_executor import BatchExecutor
from tests.support.encoders import make_encoder, make_model, noise, saved
from tests.support.fake_accelerator import FakeAccelerator

Pixels = NDArray[np.uint8]
Vectors = NDArray[np.float32]


class Device:
    """A model whose vector is the image's number, with faults by number and by batch size."""

    def __init__(self, count: int) -> None:
        self.pixels: Pixels = np.arange(count, dtype=np.uint8).reshape(count, 1)
        self.jobs = [
            Job(id=f"j{n}", key=Lane.BULK.queue, attempt=1, raw=b"", moments=StageTimestamps(claimed_s=0.0), slot=n)
            for n in range(count)
        ]
        self.room = count
        self.nan: set[int] = set()
        self.nan_in_fp32: set[int] = set()
        self.failing: set[int] = set()
        self.short = False
        self.error: Exception | None = None
        self.launch_error: Exception | None = None
        self.exact_error: Exception | None = None
        self.unscorable: set[str] = set()
        self.score_calls: list[int] = []
        self.batches: list[int] = []
        self.exact: list[int] = []
        self.caps: list[int] = []
        self.size_policy = SimpleNamespace(lower=self.caps.append)
        self.scored: dict[str, float] = {}
        self.learned: list[Any] = []

    def launch(self, pixels: Pixels, rows: Sequence[int]) -> Any:
        """Launch a batch: nothing is computed yet."""
        if self.launch_error is not None:
            error, self.launch_error = self.launch_error, None
            raise error
        return pixels[list(rows)]

    def collect(self, pixels: Any) -> Vectors:
        """The fast path, with the faults that the test set."""
        self.batches.append(len(pixels))
        numbers = [int(n) for n in pixels[:, 0]]
        if self.error is not None:
            raise self.error
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.failing & set(numbers):
            raise RuntimeError("a kernel failed")
        if rows := tuple(row for row, n in enumerate(numbers) if n in self.nan):
            raise NonFiniteError("NaN", rows)
        return pixels[: -1 if self.short else None].astype(np.float32)

    def encode_exact(self, pixels: Pixels) -> Vectors:
        """The path in FP32."""
        [number] = [int(n) for n in pixels[:, 0]]
        self.exact.append(number)
        if self.exact_error is not None:
            raise self.exact_error
        if number in self.nan_in_fp32:
            raise NonFiniteError("NaN", (0,))
        return pixels.astype(np.float32)

    def score(self, jobs: Sequence[Job], vectors: Vectors) -> None:
        """As the scorer: a vector for each job."""
        if len(jobs) != len(vectors):
            raise WrongVectors(f"expected {len(jobs)}, got {len(vectors)}")
        self.score_calls.append(len(jobs))
        if self.unscorable & {job.id for job in jobs}:
            raise KeyError("a defect")
        for job, vector in zip(jobs, vectors, strict=True):
            self.scored[job.id] = float(vector[0])

    def error_kind(self, error: BaseException) -> DeviceErrorKind:
        """The kind that the encoder would return."""
        if isinstance(error, torch.OutOfMemoryError):
            return DeviceErrorKind.OUT_OF_MEMORY
        return DeviceErrorKind.LOST if "CUDA error" in str(error) else DeviceErrorKind.OTHER

    def learn(self, flight: Any, *, host_s: float) -> None:
        """Record a successful batch."""
        assert host_s >= 0
        self.learned.append(flight)

    def run(self) -> None:
        """One batch of all."""
        model: Any = self
        executor = BatchExecutor(model, model, pixels=self.pixels)
        executor.finish(executor.launch(self.jobs))

    def failed(self) -> dict[str, ErrorCode]:
        """Jobs without tags; the others must have their own vector."""
        failed = {job.id: job.error.code for job in self.jobs if job.error is not None}
        expected = {job.id: float(job.slot) for job in self.jobs if job.id not in failed}
        assert {job_id: n for job_id, n in self.scored.items() if job_id not in failed} == expected
        return failed


def test_out_of_memory_halves_and_is_remembered() -> None:
    """Batches of 16 and 8 do not fit, 4 do: every job is answered, and no later batch is larger than 4."""
    device = Device(16)
    device.room = 5
    device.run()
    assert device.failed() == {}
    assert device.batches == [16, 8, 4, 4, 8, 4, 4]
    assert min(device.caps) == 4


def test_only_successful_batches_are_measured() -> None:
    """A batch that failed and was repeated in parts is not measured."""
    device = Device(8)
    device.run()
    assert [len(flight) for flight in device.learned] == [8]
    for wrong in ("nan", "failing"):
        device = Device(8)
        setattr(device, wrong, {3})
        device.run()
        assert device.learned == []


def test_out_of_memory_for_one_image_is_retryable() -> None:
    """The error is retryable, so the job is retried later."""
    device = Device(2)
    device.room = 0
    device.run()
    assert set(device.failed().values()) == {ErrorCode.OUT_OF_MEMORY}
    assert all(job.error is not None and job.error.retryable for job in device.jobs)


def test_nan_fails_only_after_a_retry_in_fp32() -> None:
    """Two overflow, one of them also in FP32; the other six go through the fast path once more."""
    device = Device(8)
    device.nan, device.nan_in_fp32 = {2, 5}, {5}
    device.run()
    assert device.failed() == {"j5": ErrorCode.ENCODE_FAILED}
    assert device.exact == [2, 5]
    assert device.batches == [8, 6]


def test_wrong_vector_count_encodes_one_by_one() -> None:
    """Too few vectors point to no row: each image is encoded alone in FP32, and none gets the tags of another."""
    device = Device(4)
    device.short = True
    device.run()
    assert device.failed() == {}
    assert device.exact == [0, 1, 2, 3]


@pytest.mark.parametrize("failing", [0, 3, 7])
def test_other_error_fails_only_the_image_that_causes_it(failing: int) -> None:
    """Halving finds it; the others are answered."""
    device = Device(8)
    device.failing = {failing}
    device.run()
    assert device.failed() == {f"j{failing}": ErrorCode.ENCODE_FAILED}


def test_lost_device_ends_the_process() -> None:
    """No job gets an error, and nothing is retried here."""
    device = Device(8)
    device.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(FatalError) as caught:
        device.run()
    assert caught.value.exit_code is ExitCode.DEVICE
    assert device.batches == [8]
    assert not any(job.error for job in device.jobs)


def test_device_lost_in_the_fp32_retry_ends_the_process() -> None:
    """The device is the cause: the image that was retried just then gets no error."""
    device = Device(4)
    device.nan = {2}
    device.exact_error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(FatalError) as caught:
        device.run()
    assert caught.value.exit_code is ExitCode.DEVICE
    assert device.exact == [2]
    assert not any(job.error for job in device.jobs)


def test_out_of_memory_in_the_fp32_retry_is_retryable() -> None:
    """The weights in FP32 are loaded then, and another process may hold the memory: the image is not the cause."""
    device = Device(4)
    device.nan = {2}
    device.exact_error = torch.OutOfMemoryError("CUDA out of memory")
    device.run()
    assert device.failed() == {"j2": ErrorCode.OUT_OF_MEMORY}
    assert device.jobs[2].error is not None
    assert device.jobs[2].error.retryable


@pytest.mark.parametrize("lose_after", range(0, 10, 3))
def test_device_lost_at_any_operation_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose_after: int
) -> None:
    """With two batches under way: each is answered, or ends the process, which gives its jobs back."""
    lost = FakeAccelerator(seed=lose_after, width=8)
    monkeypatch.setattr("shiwu_worker.stages.encode.encoder.open_accelerator", lambda _: lost)
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(4,), threads=1)
    device = Device(4)
    scorer: Any = device
    executor = BatchExecutor(encoder, scorer, pixels=noise(4))
    lost.lose_after = lose_after

    def run() -> None:
        ahead = executor.launch(device.jobs)
        for _ in range(10):
            before, ahead = ahead, executor.launch(device.jobs)
            executor.finish(before)

    with pytest.raises(FatalError) as caught:
        run()
    assert caught.value.exit_code is ExitCode.DEVICE
    assert not any(job.error for job in device.jobs)


def test_defect_in_scoring_says_nothing_about_the_image() -> None:
    """The job is retried; the others of its batch get their tags."""
    device = Device(8)
    device.unscorable = {"j3"}
    device.run()
    assert device.failed() == {"j3": ErrorCode.INTERNAL_ERROR}
    error = device.jobs[3].error
    assert error is not None
    assert (error.stage, error.retryable) == (Stage.SCORE, True)
    assert "KeyError" in error.message


def test_job_whose_vector_cannot_be_kept_has_an_error_alone() -> None:
    """Jobs with the same image would wait for it; the answer has no tags beside the error."""
    device = Device(2)
    model: Any = device

    def keep(jobs: Sequence[Job], _: Vectors) -> None:
        for job in jobs:
            job.tags = ()
        raise MemoryError

    executor = BatchExecutor(model, model, pixels=device.pixels, on_encoded=keep)
    executor.finish(executor.launch(device.jobs))
    assert set(device.failed().values()) == {ErrorCode.INTERNAL_ERROR}
    assert [job.tags for job in device.jobs] == [None, None]


def test_job_with_a_known_vector_costs_no_other_its_tags() -> None:
    """A defect in scoring one of them is found by halving, without the device."""
    device = Device(8)
    device.unscorable = {"j5"}
    model: Any = device
    for job in device.jobs:
        job.shared_vector = np.array([job.slot], np.float32)
    BatchExecutor(model, model, pixels=device.pixels).score_known(device.jobs)
    assert device.failed() == {"j5": ErrorCode.INTERNAL_ERROR}
    assert device.score_calls == [8, 4, 4, 2, 1, 1, 2]
    assert device.batches == []
    assert all(job.scored_s > 0 for job in device.jobs)


def test_batch_size_is_that_of_the_batch_with_the_answer() -> None:
    """After a failed batch: of the part in which the image was encoded; 1 for an image that was encoded alone."""
    device = Device(8)
    device.nan = {2, 5}
    device.run()
    assert [job.batch_size for job in device.jobs] == [6, 6, 1, 6, 6, 1, 6, 6]
    device = Device(8)
    device.room = 4
    device.run()
    assert {job.batch_size for job in device.jobs} == {4}
    for job in device.jobs:
        assert 0 < job.moments.encode_from_s <= job.moments.score_from_s <= job.scored_s


def test_batch_that_the_device_refuses_is_launched_in_parts() -> None:
    """An error of the launch is handled as one of the batch: here nothing is wrong with any image."""
    device = Device(4)
    device.launch_error = RuntimeError("refused")
    device.run()
    assert device.failed() == {}
    assert device.batches == [2, 2]
    assert device.learned == []


def test_device_errors_are_classified(tmp_path: Path) -> None:
    """Out of memory, a lost context, and everything else."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    assert encoder.error_kind(torch.OutOfMemoryError("CUDA out of memory")) is DeviceErrorKind.OUT_OF_MEMORY
    assert (
        encoder.error_kind(RuntimeError("[enforce fail] not enough memory: you tried")) is DeviceErrorKind.OUT_OF_MEMORY
    )
    assert encoder.error_kind(RuntimeError("CUDA error: an illegal memory access")) is DeviceErrorKind.LOST
    assert encoder.error_kind(ValueError("shape")) is DeviceErrorKind.OTHER


def test_fp32_retry_equals_the_checkpoint_in_fp32(tmp_path: Path) -> None:
    """Whatever dtype is in use, `encode_exact` gives what an FP32 encoder gives."""
    folder = saved(make_model("clip"), tmp_path)
    pixels = noise(2)
    exact = make_encoder(folder, dtype="float32").encode(pixels)
    half = make_encoder(folder, dtype="bfloat16")
    np.testing.assert_allclose(half.encode_exact(pixels), exact, atol=1e-5)
    assert not np.array_equal(half.encode(pixels), exact)
