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

from shiwu_worker.stages.encode.accelerator import Accelerator, gather_rows
from shiwu_worker.stages.encode.cpu_pool import BatchTask, CpuInferencePool, Spent
from shiwu_worker.stages.encode.gpu_sizes import BUFFERS
from shiwu_worker.stages.encode.towers import Tower

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
                # Also after `wait`, because `wait` passes no error on.
                buffer.events.done.synchronize()
                seconds = buffer.events.begun.elapsed_time(buffer.events.done) / 1000
                self.spent = Spent(cost=seconds, seconds=seconds)
            return self._ring.read(buffer, self._count)
        finally:
            self._ring.free(buffer)


class _Events:
    """The events of one buffer: the copy is done, the tower begins, the vectors are back."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.copied = accelerator.event()
        self.begun = accelerator.event(is_timed=True)
        self.done = accelerator.event(is_timed=True)


class _StagingBuffer:
    """Memory of one batch on the host and on the device; on a CPU both are the same."""

    def __init__(
        self, *, images: int, shape: tuple[int, int, int], width: int, accelerator: Accelerator | None
    ) -> None:
        if accelerator is None:
            self.on_host = self.on_device = torch.zeros((images, *shape), dtype=torch.uint8)
            self.vectors = torch.zeros((images, width), dtype=torch.float32)
        else:
            self.on_host = accelerator.pinned((images, *shape), torch.uint8)
            self.on_device = accelerator.allocate((images, *shape), torch.uint8)
            self.vectors = accelerator.pinned((images, width), torch.float32)
        self.events = None if accelerator is None else _Events(accelerator)
        self.task: BatchTask | None = None
        """The batch in the CPU pool, which may still write to `vectors`."""


class StagingRing:
    """Staging buffers in front of one image tower. Thread-safe: one launch at a time, `collect` alongside it.

    Args:
        batch_sizes: allowed batch sizes, ascending.
        shape: of one image, (h, w, 3).
        width: length of a vector.
        accelerator: runs the tower; None on a CPU.
        cpu_pool: runs the tower on a CPU; it may be replaced between two launches.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        batch_sizes: Sequence[int],
        shape: tuple[int, int, int],
        width: int,
        accelerator: Accelerator | None = None,
        cpu_pool: CpuInferencePool | None = None,
    ) -> None:
        self._tower = tower
        self.batch_sizes = tuple(batch_sizes)
        """May lose sizes between two launches."""
        self._accelerator = accelerator
        self.cpu_pool = cpu_pool
        self._launch_lock = threading.Lock()
        self._free: queue.Queue[_StagingBuffer] = queue.Queue(BUFFERS)
        for _ in range(BUFFERS):
            buffer = _StagingBuffer(images=self.batch_sizes[-1], shape=shape, width=width, accelerator=accelerator)
            self._free.put(buffer)

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns while the device works."""
        return self._accelerator is not None

    def free(self, buffer: _StagingBuffer) -> None:
        """Take back a buffer whose result was read."""
        self._free.put_nowait(buffer)

    def read(self, buffer: _StagingBuffer, count: int) -> NDArray[np.float32]:
        """The first vectors of a buffer whose batch is done, as an array of its own."""
        vectors = buffer.vectors[:count]
        return vectors.numpy().copy() if self._accelerator is None else self._accelerator.read(vectors)

    def padded_size(self, count: int) -> int:
        """The batch size at which `count` images run."""
        return next(size for size in self.batch_sizes if size >= count)

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
            if self._accelerator is not None:
                self._accelerator.gather(buffer.on_host, pixels, rows)
                with self._launch_lock:
                    self._run(self._accelerator, buffer, count=count, size=size)
            else:
                gather_rows(buffer.on_host.numpy(), pixels, rows)
                buffer.on_host[count:size] = 0
                with self._launch_lock:
                    self._run_on_cpu(buffer, size)
        except BaseException:  # no failure may lose a buffer
            self.free(buffer)
            raise
        return InFlightBatch(self, buffer, count=count, size=size)

    def _run_on_cpu(self, buffer: _StagingBuffer, size: int) -> None:
        if self.cpu_pool is None:
            raise RuntimeError("expected an accelerator or a pool of CPU threads, got neither")
        buffer.task = self.cpu_pool.submit(self._tower, buffer.on_device[:size], buffer.vectors[:size])

    def _run(self, accelerator: Accelerator, buffer: _StagingBuffer, *, count: int, size: int) -> None:
        events = buffer.events
        if events is None:
            raise RuntimeError("expected a staging buffer with events")
        # Rows of padding keep what was there: each row's vector depends on its own pixels only.
        with accelerator.copying():
            accelerator.copy(buffer.on_device[:count], buffer.on_host[:count])
            accelerator.record(events.copied)
        with accelerator.computing():
            accelerator.wait(events.copied)
            accelerator.record(events.begun)
            # On the same stream as the tower, whose next run overwrites its output.
            accelerator.copy(buffer.vectors[:count], self._tower(buffer.on_device[:size])[:count])
            accelerator.record(events.done)
