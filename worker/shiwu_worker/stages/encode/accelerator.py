# ruff: noqa: D102  `Accelerator` describes the methods of its implementation
"""The asynchronous device behind the encoder: its streams, events, pinned memory, copies and graphs.

All that can happen on the device while the host goes on is here, so that tests can put a device in its place that runs
its work in any order that streams and events allow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Wait until the work before this point is done; raises RuntimeError for an error of the device."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this point to `end`, both of which the device has reached."""


class Graph(Protocol):
    """Work that was captured once and is replayed with the same memory."""

    output: torch.Tensor
    """What a replay overwrites."""

    def replay(self) -> None:
        """Run the work on the compute stream; returns while it runs."""


class Accelerator(Protocol):
    """One device with two streams: copies to the device run beside computation. Launch from one thread at a time.

    Memory of a graph may lie where that of another graph lies. Its output is therefore valid only until the next
    replay on the compute stream, which is the only stream for computation.
    """

    def event(self, *, is_timed: bool = False) -> Event:
        """Make an event; `synchronize` on it sleeps and does not spin."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device reads and writes while the host goes on."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device, which every stream may use from now on."""

    def gather(self, target: torch.Tensor, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> None:
        """Write rows of `pixels` (all of them for None) to the first rows of pinned memory, on the host."""

    def read(self, source: torch.Tensor) -> NDArray[np.float32]:
        """Read pinned memory on the host, into an array of its own."""

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """Make the copy stream the current one."""

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Make the compute stream the current one, for inference."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the current stream; returns immediately."""

    def record(self, event: Event) -> None:
        """Let the event stand for the work that the current stream has been given so far."""

    def wait(self, event: Event) -> None:
        """Let further work of the current stream wait for the event, which was recorded before."""

    def run(self, work: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor) -> torch.Tensor:
        """Run `work` on the current stream; returns while it runs."""

    def capture(self, work: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor, *, pool: Any) -> Graph:
        """Capture `work` with this input as a graph of the compute stream, whose memory is in `pool`.

        Raises:
            RuntimeError: the work cannot be captured.
        """

    def new_pool(self) -> Any:
        """A memory pool for graphs."""

    def synchronize(self) -> None:
        """Wait until all work is done; raises RuntimeError for an error of the device."""

    def release_memory(self) -> None:
        """Give memory that is cached and unused back to the device."""


class _CudaGraph:
    """A CUDA graph and its output."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()


class CudaAccelerator:
    """A CUDA device. Its torch.device stays usable alongside, on the default stream of each thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own

    def event(self, *, is_timed: bool = False) -> torch.cuda.Event:
        # Without `blocking` a thread that waits spins on a core, which loaders need.
        return torch.cuda.Event(enable_timing=is_timed, blocking=True)  # type: ignore[no-untyped-call]  # torch's own

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        # The zeros are written on this thread's stream, and neither of the two streams waits for that one.
        torch.cuda.current_stream(self._device).synchronize()
        return memory

    def gather(self, target: torch.Tensor, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> None:
        gather_rows(target.numpy(), pixels, rows)

    def read(self, source: torch.Tensor) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = source.numpy().copy()
        return vectors

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        with torch.cuda.stream(self._copies):
            yield

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        with torch.cuda.stream(self._compute), torch.inference_mode():
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self, event: Any) -> None:
        event.record(torch.cuda.current_stream(self._device))

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def run(self, work: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor) -> torch.Tensor:
        return work(raw)

    def capture(self, work: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor, *, pool: Any) -> _CudaGraph:
        graph = torch.cuda.CUDAGraph()
        with (
            # Also because a capture that fails leaves its stream the current one of this thread.
            self.computing(),
            # Other threads may call CUDA meanwhile; only calls of this thread can break the capture.
            torch.cuda.graph(graph, pool=pool, stream=self._compute, capture_error_mode="thread_local"),
        ):
            output = work(raw)
        return _CudaGraph(graph, output)

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()


def open_accelerator(device: torch.device) -> Accelerator | None:
    """The accelerator behind a torch.device; None for a CPU."""
    return CudaAccelerator(device) if device.type == "cuda" else None


def gather_rows(target: NDArray[np.uint8], pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> None:
    """Write rows of `pixels` (all of them for None) to the first rows of `target`."""
    if rows is None:
        target[: len(pixels)] = pixels
    else:
        # "clip" and not "raise": the latter gathers into a buffer first.
        np.take(pixels, rows, axis=0, out=target[: len(rows)], mode="clip")
