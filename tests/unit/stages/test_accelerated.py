# ruff: noqa: D102  `Accelerator` describes the methods of the devices here
"""Batches on an asynchronous device: in every order that streams and events allow, each gets its own vectors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from structlog.testing import capture_logs

from shiwu_worker.stages.encode.accelerator import CudaAccelerator
from shiwu_worker.stages.encode.gpu_sizes import BUFFERS
from shiwu_worker.stages.encode.staging import InFlightBatch, StagingRing
from shiwu_worker.stages.encode.towers import AcceleratedTower, GraphedTower
from tests.support.fake_accelerator import FakeAccelerator, FakeGraph, Race, Work

SHAPE = (2, 2, 3)
SIZES = (1, 2, 4, 8)
WIDTH = 12
IMAGES: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), np.uint8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("launch"), st.lists(st.integers(0, 63), min_size=1, max_size=8)),
        st.tuples(st.just("collect"), st.integers(0, BUFFERS - 1)),
        st.tuples(st.just("wait"), st.integers(0, BUFFERS - 1)),
        st.tuples(st.just("encode"), st.lists(st.integers(0, 63), min_size=1, max_size=8)),
    ),
    max_size=24,
)


def tower(raw: torch.Tensor) -> torch.Tensor:
    """The pixels of each image themselves, as its vector."""
    return raw.flatten(1).float()


def make_ring(device: FakeAccelerator, *, has_graphs: bool = True) -> StagingRing:
    """Staging buffers in front of the tower."""
    accelerated = (
        GraphedTower(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=device)
        if has_graphs
        else AcceleratedTower(tower, device)
    )
    return StagingRing(accelerated, batch_sizes=SIZES, shape=SHAPE, width=WIDTH, accelerator=device)


def check(batch: InFlightBatch, rows: list[int]) -> None:
    """Collect a batch; each row must have the vector of its image."""
    np.testing.assert_array_equal(batch.collect(), IMAGES[rows].reshape(len(rows), -1).astype(np.float32))


def play(ring: StagingRing, steps: list[tuple[str, Any]]) -> None:
    """Do these steps, as several threads could, and collect what is left."""
    under_way: list[tuple[InFlightBatch, list[int]]] = []
    for name, argument in steps:
        if name == "launch" and len(under_way) < BUFFERS:
            pixels = IMAGES.copy()
            under_way.append((ring.launch(pixels, argument), argument))
            pixels[:] = 0  # the loaders may write to the slots as soon as the batch is launched
        elif name == "encode" and len(under_way) < BUFFERS:
            check(ring.launch(IMAGES[argument], None), argument)
        elif name == "wait" and under_way:
            under_way[argument % len(under_way)][0].wait()
        elif name == "collect" and under_way:
            check(*under_way.pop(argument % len(under_way)))
    for batch, rows in under_way:
        check(batch, rows)


@settings(max_examples=150)
@given(steps=STEPS, seed=st.integers(0, 2**16), has_graphs=st.booleans())
def test_every_schedule_gives_the_vectors_of_a_serial_run(
    steps: list[tuple[str, Any]], seed: int, has_graphs: bool
) -> None:
    """Three batches under way, collected in any order, beside a canary; with graphs and without."""
    play(make_ring(FakeAccelerator(seed=seed, width=WIDTH), has_graphs=has_graphs), steps)


class Hesitant(FakeAccelerator):
    """A device whose first launch waits until another thread is about to launch, and whether that goes on."""

    def __init__(self) -> None:
        super().__init__(seed=1, width=WIDTH)
        self.launches: list[int] = []
        """The thread of each call in a launch."""
        self.has_begun = threading.Event()
        self.is_another_there = threading.Event()
        self.does_another_go_on = threading.Event()

    def gather(self, target: torch.Tensor, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> None:
        super().gather(target, pixels, rows)
        if self.has_begun.is_set():
            self.is_another_there.set()

    def copying(self) -> contextlib.AbstractContextManager[None]:
        if self.has_begun.is_set():
            self.does_another_go_on.set()
        else:
            self.has_begun.set()
            assert self.is_another_there.wait(30)
            self.does_another_go_on.wait(0.2)  # in vain, because launches come one at a time
        self.launches.append(threading.get_ident())
        return super().copying()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        self.launches.append(threading.get_ident())
        return super().computing()


def test_threads_launch_one_at_a_time() -> None:
    """The canary and the encode thread use the same streams and the same graphs."""
    device = Hesitant()
    ring = make_ring(device, has_graphs=False)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ring.launch, IMAGES, [1, 2])
        assert device.has_begun.wait(30)
        second = pool.submit(ring.launch, IMAGES, [3])
        batches = [(first.result(30), [1, 2]), (second.result(30), [3])]
    for batch, rows in batches:
        check(batch, rows)
    one, _, other, _ = device.launches
    assert device.launches == [one, one, other, other]
    assert one != other


def ends_well(batch: InFlightBatch, rows: list[int]) -> bool:
    """Whether a batch could be collected; it has its own vectors then."""
    try:
        check(batch, rows)
    except torch.AcceleratorError:
        return False
    return True


@settings(max_examples=100)
@given(seed=st.integers(0, 2**16), lose_after=st.integers(0, 40), has_graphs=st.booleans())
def test_lost_device_gives_right_vectors_or_its_error(seed: int, lose_after: int, has_graphs: bool) -> None:
    """Whichever call tells of the loss first. After it every batch gets the error, and none waits for a buffer."""
    device = FakeAccelerator(seed=seed, width=WIDTH)
    ring = make_ring(device, has_graphs=has_graphs)
    device.lose_after = lose_after
    under_way: list[tuple[InFlightBatch, list[int]]] = []
    ended: list[bool] = []
    for number in range(20):
        rows = list(range(number, number + 1 + number % 8))
        try:
            under_way.append((ring.launch(IMAGES, rows), rows))
        except torch.AcceleratorError:
            ended.append(False)
        if len(under_way) == BUFFERS:
            under_way[0][0].wait()
            ended.append(ends_well(*under_way.pop(0)))
    ended += [ends_well(*each) for each in under_way]
    assert len(ended) == 20
    assert device.is_lost
    assert sorted(ended, reverse=True) == ended
    assert not ended[-1]


class Faulty(FakeAccelerator):
    """A device for which the product forgets one thing that it must not forget."""

    def __init__(self, fault: str, *, seed: int) -> None:
        super().__init__(seed=seed, width=WIDTH)
        self.fault = fault

    def wait(self, event: Any) -> None:
        if self.fault != "the tower does not wait for the copy":
            super().wait(event)

    def record(self, event: Any) -> None:
        if self.fault != "events are not recorded":
            super().record(event)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        is_moved = self.fault == f"{MOVED[target.dtype]} are copied on the other stream" and self._current == "compute"
        with self.copying() if is_moved else contextlib.nullcontext():
            super().copy(target, source)

    def reach(self, operation: Any) -> None:
        if self.fault != "the host does not wait for the result":
            super().reach(operation)


MOVED = {torch.float32: "results", torch.uint8: "inputs"}
FAULTS = [
    "the tower does not wait for the copy",
    "events are not recorded",
    "results are copied on the other stream",
    "inputs are copied on the other stream",
    "the host does not wait for the result",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_forgotten_wait_is_found(fault: str) -> None:
    """Otherwise the test before proves nothing. One schedule is enough, whatever its draw."""
    ring = make_ring(Faulty(fault, seed=1))
    steps: list[tuple[str, Any]] = [("launch", [1, 2, 3]), ("launch", [4]), ("launch", [5, 6]), ("collect", 0)]
    with pytest.raises((Race, AssertionError)):
        play(ring, steps * 3)


class Refusing(FakeAccelerator):
    """A device on which captures, or passes of large batches, fail."""

    def __init__(self, *, refused_size: int = 0, memory_size: int = 1 << 30) -> None:
        super().__init__(seed=0, width=WIDTH)
        self.refused_size, self.memory_size = refused_size, memory_size
        self.refusal: Exception | None = None
        self.captured: list[int] = []

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        if len(raw) > self.memory_size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(work, raw)

    def capture(self, work: Work, raw: torch.Tensor, *, pool: Any) -> FakeGraph:
        if len(raw) == self.refused_size and self.refusal is not None:
            raise self.refusal
        if len(raw) == self.refused_size:
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            except RuntimeError:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904 as torch does
        self.captured.append(len(raw))
        return super().capture(work, raw, pool=pool)


@pytest.mark.parametrize("refused_size", SIZES)
def test_failed_capture_leaves_a_worker_that_answers(refused_size: int) -> None:
    """All sizes run eager then, no other capture is tried, and the log has the error that broke the capture."""
    device = Refusing(refused_size=refused_size)
    with capture_logs() as logs:
        ring = make_ring(device)
    [line] = [line for line in logs if line["event"] == "graph_not_captured"]
    assert line["cause"] == "operation not permitted when stream is capturing"
    assert ring._tower.captured_sizes == ()  # type: ignore[attr-defined]  # a GraphedTower
    play(ring, [("launch", [1, 2, 3]), ("encode", [4]), ("launch", [0] * 8)])


def test_sizes_without_memory_are_left_out() -> None:
    """The first size without memory and all larger ones; the others have graphs."""
    device = Refusing(memory_size=2)
    with capture_logs() as logs:
        graphed = GraphedTower(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=device)
    assert graphed.fitting_sizes == graphed.captured_sizes == (1, 2)
    assert [line["batch_size"] for line in logs if line["event"] == "batch_size_does_not_fit"] == [4]
    with pytest.raises(torch.OutOfMemoryError):
        GraphedTower(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=Refusing(memory_size=0))


PASS_BYTES = 100
IMAGE_BYTES = 12


class Full(FakeAccelerator):
    """A device with so much memory: a pass takes `PASS_BYTES` for each image, and a capture `extra_bytes` more."""

    def __init__(self, memory_bytes: int, *, extra_bytes: int = 0) -> None:
        super().__init__(seed=0, width=WIDTH)
        self.memory_bytes, self.extra_bytes = memory_bytes, extra_bytes

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        if len(raw.untyped_storage()) + len(raw) * PASS_BYTES > self.memory_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(work, raw)

    def capture(self, work: Work, raw: torch.Tensor, *, pool: Any) -> FakeGraph:
        if len(raw.untyped_storage()) + len(raw) * PASS_BYTES + self.extra_bytes > self.memory_bytes:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return super().capture(work, raw, pool=pool)


@pytest.mark.parametrize("memory_bytes", range(200, 1800, 50))
def test_sizes_that_fit_leave_memory_for_staging_buffers(memory_bytes: int) -> None:
    """However little memory there is: the start would fail where the last of the buffers does not fit."""
    graphed = GraphedTower(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=Full(memory_bytes))
    assert graphed.captured_sizes == graphed.fitting_sizes
    largest = graphed.fitting_sizes[-1]
    assert largest * (PASS_BYTES + (1 + BUFFERS) * IMAGE_BYTES) <= memory_bytes


def test_capture_without_memory_leaves_out_the_largest_sizes() -> None:
    """The others have graphs: a graph takes more memory than the pass that was tried before."""
    device = Full(8 * (PASS_BYTES + IMAGE_BYTES * (BUFFERS + 2)), extra_bytes=4 * PASS_BYTES)
    with capture_logs() as logs:
        graphed = GraphedTower(tower, batch_sizes=SIZES, shape=SHAPE, accelerator=device)
    assert graphed.fitting_sizes == graphed.captured_sizes == (1, 2, 4)
    lines = [(line["batch_size"], line["meaning"]) for line in logs if line["event"] == "graph_not_captured"]
    assert lines == [(8, "the largest size is left out")]


def test_graphs_without_any_memory_leave_a_worker_that_answers() -> None:
    """Only the smallest size is left then, and it runs eager."""
    device = Refusing()
    device.refused_size, device.refusal = 1, torch.OutOfMemoryError("CUDA out of memory")
    ring = make_ring(device)
    assert ring._tower.captured_sizes == ()  # type: ignore[attr-defined]  # a GraphedTower
    assert ring._tower.fitting_sizes == (1,)  # type: ignore[attr-defined]  # a GraphedTower


def reads_a_number(raw: torch.Tensor) -> torch.Tensor:
    """A tower that reads a number back to the host, as models with images of many sizes do."""
    return raw.flatten(1).float() * float(raw.max())


@pytest.mark.parametrize(
    "uncapturable", [reads_a_number, lambda raw: raw.flatten(1).float()[:, raw.flatten(1).sum(0).nonzero()[:, 0]]]
)
def test_tower_that_waits_for_the_device_is_not_captured(uncapturable: Callable[..., torch.Tensor]) -> None:
    """A capture would fail, and a failed capture leaves torch's allocator in doubt, so none is tried."""
    device = Refusing()
    with capture_logs() as logs:
        GraphedTower(uncapturable, batch_sizes=SIZES, shape=SHAPE, accelerator=device)
    [line] = [line for line in logs if line["event"] == "graph_not_captured"]
    assert "waits for the device" in line["cause"]
    assert device.captured == []


def test_only_rows_with_images_are_copied() -> None:
    """Padding may be nearly half of a batch, and copying it would take as much of the bus."""
    device = FakeAccelerator(seed=0, width=WIDTH)
    ring, copied, copy = make_ring(device), list[int](), device.copy

    def counted(target: torch.Tensor, source: torch.Tensor) -> None:
        copied.append(len(source))
        copy(target, source)

    device.copy = counted  # type: ignore[method-assign]  # counts and does the same
    check(ring.launch(IMAGES, [3, 1, 4, 1, 5]), [3, 1, 4, 1, 5])
    # To the device, into the input of the graph of eight, and back.
    assert copied == [5, 8, 5]


def test_waiting_for_a_gpu_takes_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event spins unless it is made to block; the loaders need the core."""
    made: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: made.append(options))
    accelerator = object.__new__(CudaAccelerator)
    accelerator.event()
    accelerator.event(is_timed=True)
    assert made == [{"enable_timing": False, "blocking": True}, {"enable_timing": True, "blocking": True}]
