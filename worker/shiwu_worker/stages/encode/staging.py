"""Staging buffers between host and device: pinned memory, a copy stream, and the wait for a result.

The host fills one buffer while the device works from another. On a CPU the same code runs without streams, on the
threads of a `CpuInferencePool`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shiwu_worker.stages.encode.cpu_pool import BatchTask, CpuInferencePool, Spent
from shiwu_worker.stages.encode.towers import Tower

BUFFERS: Final = 3
"""One on the device, one copied ahead, one whose result is being read."""
FREE_BUFFER_TIMEOUT_S: Final = 120.0
"""Longest wait for a free buffer; after it the thread that reads the results is taken to have ended."""


class InFlightBatch:
    """A batch on the device, from `StagingRing.launch` to `collect`. One thread at a time uses it."""

    def __init__(self, ring: StagingRing, buffer: _StagingBuffer, *, count: int, size: int) -> None:
        self._ring = ring
        self._buffer: _StagingBuffer | None = buffer
        self._count = count
        self.size = size
        """The batch size that runs: the number of images, or more if the batch was padded."""
        self.spent: Spent | None = None
        """What the batch took; set by `collect`."""
        self.is_under_way = ring.is_asynchronous
        """Whether the device may still work on the batch after the launch."""

    def wait(self) -> None:
        """Wait until the device is done; `collect` raises the device's errors."""
        if self._buffer is not None and self._buffer.events is not None:
            try:
                self._buffer.events.done.synchronize()
            except RuntimeError:
                return

    def collect(self) -> NDArray[np.float32]:
        """The vectors float32 (n, d), once; the buffer is free afterwards.

        Raises:
            RuntimeError: an error of the device in this batch or in one before it.
            Exception: on a CPU, whatever the model raises.
        """
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            raise RuntimeError("expected one collect for each launch")
        try:
            if buffer.task is not None:
                self.spent = buffer.task.wait()
            elif buffer.events is not None:
                buffer.events.done.synchronize()
                seconds = buffer.events.begun.elapsed_time(buffer.events.done) / 1000
                self.spent = Spent(cost=seconds, seconds=seconds)
            return buffer.vectors[: self._count].numpy().copy()
        finally:
            self._ring.free(buffer)


class _CudaEvents:
    """The events of one buffer: the copy is done, the tower begins, the vectors are back."""

    def __init__(self) -> None:
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        self.begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        self.done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


class _StagingBuffer:
    """Memory of one batch on the host and on the device; on a CPU both are the same."""

    def __init__(self, *, images: int, shape: tuple[int, int, int], width: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.on_host = torch.zeros((images, *shape), dtype=torch.uint8, pin_memory=is_cuda)
        self.pixels: NDArray[np.uint8] = self.on_host.numpy()
        """A view of `on_host`."""
        self.on_device = torch.empty_like(self.on_host, device=device) if is_cuda else self.on_host
        self.vectors = torch.zeros((images, width), dtype=torch.float32, pin_memory=is_cuda)
        self.events = _CudaEvents() if is_cuda else None
        self.task: BatchTask | None = None
        """The batch in the CPU pool, which may still write to `vectors`."""


class StagingRing:
    """Staging buffers in front of one image tower. Thread-safe: one launch at a time, `collect` alongside it.

    Args:
        batch_sizes: allowed batch sizes, ascending.
        shape: of one image, (h, w, 3).
        width: length of a vector.
        stream: the stream on which the tower runs; None on a CPU.
        cpu_pool: runs the tower on a CPU; it may be replaced between two launches.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        batch_sizes: Sequence[int],
        shape: tuple[int, int, int],
        width: int,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        cpu_pool: CpuInferencePool | None = None,
    ) -> None:
        self._tower = tower
        self._batch_sizes = tuple(batch_sizes)
        self._stream = stream
        self.cpu_pool = cpu_pool
        self._copy_stream: torch.cuda.Stream | None = None
        if stream is not None:
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._launch_lock = threading.Lock()
        self._free: queue.Queue[_StagingBuffer] = queue.Queue(BUFFERS)
        for _ in range(BUFFERS):
            self._free.put(_StagingBuffer(images=self._batch_sizes[-1], shape=shape, width=width, device=device))

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns while the device works."""
        return self._stream is not None

    def free(self, buffer: _StagingBuffer) -> None:
        """Take back a buffer whose result was read."""
        self._free.put_nowait(buffer)

    def padded_size(self, count: int) -> int:
        """The batch size at which `count` images run."""
        return next(size for size in self._batch_sizes if size >= count)

    def split_count(self, size: int) -> int:
        """Into how many parts a batch of this size is split; 1 if it runs as a whole."""
        return 1 if self.cpu_pool is None else self.cpu_pool.split_count(size)

    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> InFlightBatch:
        """Gather rows of `pixels` (all of them for None), pad to the next batch size and start the tower.

        On a CPU it returns when a thread of the pool could begin another batch.

        Raises:
            RuntimeError: an error of the device, or no buffer came free in time.
        """
        count = len(pixels) if rows is None else len(rows)
        size = self.padded_size(count)
        try:
            buffer = self._free.get(timeout=FREE_BUFFER_TIMEOUT_S)
        except queue.Empty:
            raise RuntimeError(f"expected a result to be read within {FREE_BUFFER_TIMEOUT_S:g} s") from None
        try:
            if rows is None:
                buffer.pixels[:count] = pixels
            else:
                # "clip" and not "raise": the latter gathers into a buffer first.
                np.take(pixels, rows, axis=0, out=buffer.pixels[:count], mode="clip")
            buffer.pixels[count:size] = 0
            with self._launch_lock:
                self._run(buffer, size)
        except BaseException:  # no failure may lose a buffer
            self.free(buffer)
            raise
        return InFlightBatch(self, buffer, count=count, size=size)

    def _run(self, buffer: _StagingBuffer, size: int) -> None:
        if self.cpu_pool is not None:
            buffer.task = self.cpu_pool.submit(self._tower, buffer.on_device[:size], buffer.vectors[:size])
            return
        if self._stream is None or buffer.events is None:
            raise RuntimeError("expected a CUDA stream or a pool of CPU threads, got neither")
        with torch.cuda.stream(self._copy_stream):
            buffer.on_device[:size].copy_(buffer.on_host[:size], non_blocking=True)
            buffer.events.copied.record()
        self._stream.wait_event(buffer.events.copied)
        with torch.cuda.stream(self._stream), torch.inference_mode():
            buffer.events.begun.record()
            buffer.vectors[:size].copy_(self._tower(buffer.on_device[:size]), non_blocking=True)
            buffer.events.done.record()
