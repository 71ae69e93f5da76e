"""Where batches cross between host and device: pinned memory, a copy stream, and the wait for a result.

The host fills one berth while the device works from another. On a CPU the same code runs without streams, by a crew of
threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool, Spent, Work
from shiwu_worker.stages.encode.towers import Tower

BERTHS: Final = 3
"""One on the device, one copied ahead, one whose result is being read."""
FREE_S: Final = 120.0
"""Longest wait for a free berth; beyond it whoever reads the results has died."""


class InFlightBatch:
    """A batch that the device works on, from `StagingRing.launch` to `collect`."""

    def __init__(self, berths: StagingRing, berth: _StagingBuffer, *, count: int, rung: int) -> None:
        self._berths = berths
        self._berth: _StagingBuffer | None = berth
        self._count = count
        self.rung = rung
        """The size that was run: `count`, or more where it was padded."""
        self.spent: Spent | None = None
        """What it took, once it was collected."""
        self.is_under_way = berths.is_asynchronous
        """Whether the device still worked when this was launched."""

    def wait(self) -> None:
        """Wait until the device is done; its errors come out of `collect`."""
        if self._berth is not None and self._berths.is_asynchronous:
            try:
                self._berth.done.synchronize()
            except RuntimeError:
                return

    def collect(self) -> NDArray[np.float32]:
        """The vectors float32 (n, d); once. The berth is free afterwards.

        Raises:
            RuntimeError: what the device says of this batch or of one before it.
            Exception: on a CPU, whatever the model raises.
        """
        berth, self._berth = self._berth, None
        if berth is None:
            raise RuntimeError("expected one collect for each launch")
        try:
            if berth.work is not None:
                self.spent = berth.work.wait()
            else:
                berth.done.synchronize()
                seconds = berth.begun.elapsed_time(berth.done) / 1000
                self.spent = Spent(cost=seconds, seconds=seconds)
            return berth.vectors[: self._count].numpy().copy()
        finally:
            self._berths.free(berth)


class _StagingBuffer:
    """Buffers of one batch on both sides. `filled` is a view of `staged`."""

    def __init__(self, *, pictures: int, shape: tuple[int, int, int], width: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.staged = torch.zeros((pictures, *shape), dtype=torch.uint8, pin_memory=is_cuda)
        self.filled: NDArray[np.uint8] = self.staged.numpy()
        self.on_device = torch.empty_like(self.staged, device=device) if is_cuda else self.staged
        self.vectors = torch.zeros((pictures, width), dtype=torch.float32, pin_memory=is_cuda)
        self.copied: Any = _event(is_timed=False) if is_cuda else None
        self.begun: Any = _event(is_timed=True) if is_cuda else None
        self.done: Any = _event(is_timed=True) if is_cuda else None
        self.work: Work | None = None
        """What a crew may still be at."""


def _event(*, is_timed: bool) -> Any:
    return torch.cuda.Event(enable_timing=is_timed)  # type: ignore[no-untyped-call]  # torch's own


class StagingRing:
    """A ring of berths in front of one tower. Thread-safe: one launch at a time, collects beside it.

    Args:
        rungs: batch sizes, ascending.
        shape: of one picture, (h, w, 3).
        width: of a vector.
        stream: what the tower runs on; None where the device is a CPU.
        crew: runs the tower on a CPU; another one may take its place between two launches.
    """

    def __init__(
        self, tower: Tower, *, rungs: Sequence[int], shape: tuple[int, int, int], width: int, device: torch.device,
        stream: Any, cpu_pool: CpuInferencePool | None = None,
    ) -> None:  # fmt: skip
        self._tower = tower
        self._rungs = tuple(rungs)
        self._stream = stream
        self.cpu_pool = cpu_pool
        self._copy_stream: Any = None
        if stream is not None:
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._launching = threading.Lock()
        self._free: queue.Queue[_StagingBuffer] = queue.Queue(BERTHS)
        for _ in range(BERTHS):
            self._free.put(_StagingBuffer(pictures=self._rungs[-1], shape=shape, width=width, device=device))

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns while the device works."""
        return self._stream is not None

    def free(self, berth: _StagingBuffer) -> None:
        """Take back a berth whose result was read."""
        self._free.put_nowait(berth)

    def rung_of(self, count: int) -> int:
        """The size at which so many pictures are run."""
        return next(size for size in self._rungs if size >= count)

    def parts_of(self, rung: int) -> int:
        """Into how many parts such a batch is divided; 1 where it is run as a whole."""
        return 1 if self.cpu_pool is None else self.cpu_pool.parts_of(rung)

    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> InFlightBatch:
        """Gather rows of `pixels` (all of them for None), pad to the next rung and start the tower.

        On a CPU it returns when a thread of the crew is idle, which can begin another batch, or this one is done.

        Raises:
            RuntimeError: what the device says; or no berth came free.
        """
        count = len(pixels) if rows is None else len(rows)
        rung = self.rung_of(count)
        try:
            berth = self._free.get(timeout=FREE_S)
        except queue.Empty:
            raise RuntimeError(f"expected a result to be read within {FREE_S:g} s") from None
        try:
            if rows is None:
                berth.filled[:count] = pixels
            else:
                # "clip" and not "raise": the latter gathers into a buffer first.
                np.take(pixels, rows, axis=0, out=berth.filled[:count], mode="clip")
            berth.filled[count:rung] = 0
            with self._launching:
                self._run(berth, rung)
        except BaseException:  # whatever ends it, the berth is free again
            self.free(berth)
            raise
        return InFlightBatch(self, berth, count=count, rung=rung)

    def _run(self, berth: _StagingBuffer, rung: int) -> None:
        if self._stream is not None:
            with torch.cuda.stream(self._copy_stream):
                berth.on_device[:rung].copy_(berth.staged[:rung], non_blocking=True)
                berth.copied.record()
            self._stream.wait_event(berth.copied)
        if self.cpu_pool is not None:
            berth.work = self.cpu_pool.start(self._tower, berth.on_device[:rung], berth.vectors[:rung])
            return
        with torch.cuda.stream(self._stream), torch.inference_mode():
            berth.begun.record()
            berth.vectors[:rung].copy_(self._tower(berth.on_device[:rung]), non_blocking=True)
            berth.done.record()
