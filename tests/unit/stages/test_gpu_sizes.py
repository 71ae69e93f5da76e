# ruff: noqa: D102  `Accelerator` describes the methods of the device here
"""Which batch sizes a GPU uses, with a stand-in whose passes take a known time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shiwu_worker.stages.encode.gpu_sizes import BATCHES, back_to_back, fitting_sizes, time_limit_s
from shiwu_worker.stages.encode.towers import AcceleratedTower
from tests.support.fake_accelerator import FakeAccelerator, FakeEvent, Work

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHAPE = (1, 1, 3)


class TimedEvent(FakeEvent):
    """An event that keeps the time of the device."""

    at_s = 0.0

    def elapsed_time(self, end: Any) -> float:
        return float(end.at_s - self.at_s) * 1000


class TimedDevice(FakeAccelerator):
    """A device whose passes take `seconds(size)`."""

    def __init__(self, seconds: Callable[[int], float], *, memory_size: int = 1 << 30) -> None:
        super().__init__(seed=0, width=3)
        self.seconds, self.memory_size = seconds, memory_size
        self.now_s = 0.0
        self.sizes_run: set[int] = set()
        self.full: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def event(self, *, is_timed: bool = False) -> TimedEvent:
        return TimedEvent(self)

    def record(self, event: Any) -> None:
        super().record(event)
        event.at_s = self.now_s

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        if len(raw) > self.memory_size:
            raise self.full
        self.sizes_run.add(len(raw))
        self.now_s += self.seconds(len(raw))
        return super().run(work, raw)


def find(device: TimedDevice, limit_s: float = 0.025) -> tuple[int, ...]:
    """The sizes that fit."""
    tower = AcceleratedTower(lambda raw: raw.flatten(1).float(), device)
    return fitting_sizes(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=device, limit_s=limit_s)


def test_fast_gpu_gets_sizes_up_to_the_time_limit() -> None:
    """10,000 images a second: 192 take 20 ms and 256 take 26.4 ms, so larger ones are not even run."""
    device = TimedDevice(lambda size: 0.0008 + size / 10_000)
    assert find(device)[-1] == 192
    assert max(device.sizes_run) == 256


def test_slow_gpu_gets_sizes_that_use_it_well() -> None:
    """One image takes 30 ms and eight take 40 ms: under the limit of 25 ms there would be a fifth of the throughput."""
    device = TimedDevice(lambda size: 0.03 + size * 0.00125 if size <= 8 else size * 0.005)
    assert find(device)[-1] == 8
    assert time_limit_s({1: 0.1, 2: 0.11, 4: 0.12}, 0.025) == 0.12


def test_sizes_are_not_limited_if_the_operator_set_one() -> None:
    """`SHIWU_MAX_BATCH` is where the worker starts, however long its batches take."""
    assert find(TimedDevice(float), math.inf) == SIZES


def test_sizes_without_memory_and_larger_ones_are_left_out() -> None:
    """Whatever their time."""
    assert find(TimedDevice(lambda _: 0.001, memory_size=100))[-1] == 96
    with pytest.raises(torch.OutOfMemoryError):
        find(TimedDevice(lambda _: 0.001, memory_size=0))


@pytest.mark.parametrize(
    "text",
    [
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165',
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_may_be_missed_by_other_libraries(text: str) -> None:
    """On a MIG instance torch's own error has another text; any other failure ends the start."""
    device = TimedDevice(lambda _: 0.001, memory_size=100)
    device.full = RuntimeError(text)
    assert find(device)[-1] == 96
    device.full = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        find(device)


def test_throughput_counts_neither_waits_nor_the_first_batch() -> None:
    """A batch takes 10 ms on the device and 5 ms more until its result is there, which the next batches hide."""
    now_s, device_free_s, most = 0.0, 0.0, 0
    under_way: list[object] = []
    launched: list[int] = []

    class Flight:
        def __init__(self, number: int) -> None:
            nonlocal device_free_s, most
            device_free_s = max(device_free_s, now_s) + 0.01
            self.done_s = device_free_s + 0.005
            assert number == len(launched)
            launched.append(number)
            under_way.append(self)
            most = max(most, len(under_way))

        def collect(self) -> float:
            nonlocal now_s
            now_s = max(now_s, self.done_s)
            under_way.remove(self)
            return self.done_s

    seconds, results = back_to_back(Flight, under_way=3, clock=lambda: now_s)
    assert seconds == pytest.approx(0.01)
    assert results == pytest.approx([0.01 * number + 0.015 for number in range(BATCHES)])
    assert most == 3
    assert device_free_s == pytest.approx(0.01 * BATCHES)
    assert not under_way
