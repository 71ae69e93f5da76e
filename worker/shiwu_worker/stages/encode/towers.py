"""The image tower at fixed batch sizes: uint8 images on the device → unit vectors on the device.

Three ways to run the same arithmetic: eager, compiled (CPU), or one CUDA graph per batch size, replayed without Python
between its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.accelerator import Accelerator, Graph
from shiwu_worker.stages.encode.capture_rules import why_not_capturable
from shiwu_worker.stages.encode.checkpoint import unit_vectors
from shiwu_worker.stages.encode.device import is_out_of_memory
from shiwu_worker.stages.encode.fusion import normalisation, takes_raw_pixels
from shiwu_worker.stages.encode.gpu_sizes import fitting_sizes

log: FilteringBoundLogger = structlog.get_logger()
Tower = Callable[[torch.Tensor], torch.Tensor]
MAX_COMPILED_SIZES: Final = 16
_ALL_EAGER: Final = "all batch sizes run eager, which is slower and gives the same answers"


def eager_tower(
    model: Any,
    *,
    dtype: torch.dtype,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float = 1 / 255,
    device: torch.device,
) -> Tower:
    """uint8 (n, h, w, 3) → float32 (n, d), normalised on the device. Call it in inference mode.

    (x · rescale - mean) / std is one multiplication and one addition in FP32. After the projection all is FP32 again.
    """
    if takes_raw_pixels(model):
        return lambda raw: unit_vectors(model.get_image_features(pixel_values=raw.permute(0, 3, 1, 2)))
    gain, shift = (part.to(device).view(1, 3, 1, 1) for part in normalisation(mean, std, rescale))

    def run(raw: torch.Tensor) -> torch.Tensor:
        pixels = (raw.permute(0, 3, 1, 2).float() * gain + shift).to(dtype)
        return unit_vectors(model.get_image_features(pixel_values=pixels))

    return run


def compiled_tower(eager: Tower) -> Tower:
    """Compiled by inductor with frozen weights; the first run of each batch size takes 15 to 60 s."""
    return _for_all_sizes(torch.compile(eager, dynamic=False, options={"freezing": True}))


def compiled_for_gpu(eager: Tower) -> Tower:
    """Compiled by inductor, to be captured by the caller; the first run of each batch size takes 30 to 90 s."""
    # The mode without inductor's own graphs: ours have the streams and the memory pool of this process.
    return _for_all_sizes(torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs"))


def _for_all_sizes(compiled: Tower) -> Tower:
    """The compiled tower, with a program for each size: above torch's limit of 8, sizes would silently run eager."""

    def run(raw: torch.Tensor) -> torch.Tensor:
        # At each call, because settings of torch's compiler hold for the thread that makes them only.
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SIZES):
            return compiled(raw)

    return run


class AcceleratedTower:
    """A tower that the accelerator runs, operator by operator. Call it while computing on the accelerator."""

    def __init__(self, eager: Tower, accelerator: Accelerator) -> None:
        self._eager = eager
        self._accelerator = accelerator

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Run on the current stream; returns while it runs."""
        return self._accelerator.run(self._eager, raw)


class GraphedTower:
    """One graph per batch size, all in one memory pool. If one of them cannot be captured, all sizes run eager.

    The largest sizes are left out if there is no memory to capture them.

    Not thread-safe. The next run of any size may overwrite the output, so the caller copies it on the compute stream.

    Args:
        eager: the tower, which sizes without a graph run.
        limit_s: about the longest time that a batch may take; larger sizes are left out.
        compiled: is captured in place of `eager`.

    Raises:
        RuntimeError: not even the smallest size fits, or the device failed.
    """

    def __init__(
        self,
        eager: Tower,
        *,
        batch_sizes: Sequence[int],
        shape: tuple[int, int, int],
        accelerator: Accelerator,
        limit_s: float = math.inf,
        compiled: Tower | None = None,
    ) -> None:
        self._eager = AcceleratedTower(eager, accelerator)
        self._captured = compiled or eager
        self.is_compiled = compiled is not None
        """Whether the graphs are those of a compiled tower."""
        self._accelerator = accelerator
        self._graphs: dict[int, Graph] = {}
        self.fitting_sizes = fitting_sizes(
            AcceleratedTower(self._captured, accelerator),
            batch_sizes=batch_sizes,
            shape=shape,
            accelerator=accelerator,
            limit_s=limit_s,
        )
        """The batch sizes that the device has memory for, and whose batches take about `limit_s` at most; ascending."""
        self._input = accelerator.allocate((self.fitting_sizes[-1], *shape), torch.uint8)
        accelerator.synchronize()  # weights and buffers were written on other streams
        if cause := why_not_capturable(eager, self._input[: self.fitting_sizes[0]]):
            log.warning("graph_not_captured", batch_size=self.fitting_sizes[0], cause=cause, meaning=_ALL_EAGER)
            return
        while not self._capture_all():
            self.fitting_sizes = self.fitting_sizes[:-1]
            accelerator.release_memory()

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """The batch sizes that have a graph."""
        return tuple(sorted(self._graphs))

    def drop(self, size: int) -> bool:
        """Run this size eager from now on; False where it did so already."""
        return self._graphs.pop(size, None) is not None

    def _capture_all(self) -> bool:
        """Capture all sizes; False if that lacked memory, and can be tried again without the largest size."""
        # The smallest size first, in a pool of its own: if this model cannot be captured at all, nothing else is lost.
        smallest = self.fitting_sizes[0]
        # Largest first: the others then fit into its memory.
        plan = [(smallest, self._accelerator.new_pool())]
        shared = self._accelerator.new_pool()
        plan += [(size, shared) for size in reversed(self.fitting_sizes)]
        for size, pool in plan:
            try:
                self._graphs[size] = self._accelerator.capture(self._captured, self._input[:size], pool=pool)
            except RuntimeError as error:
                # torch may take a capture that failed to be still under way, so no other one is tried, and graphs that
                # share its pool are given up. A capture that lacked memory ends like any other.
                self._graphs.clear()
                is_short = is_out_of_memory(error) and len(self.fitting_sizes) > 1
                # What broke the capture is the context; the error itself tells only that the capture is void.
                log.warning(
                    "graph_not_captured",
                    batch_size=size,
                    error=str(error)[:300],
                    cause=str(error.__context__ or error.__cause__ or "")[:300],
                    meaning="the largest size is left out" if is_short else _ALL_EAGER,
                )
                return not is_short
        return True

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Run on the compute stream; returns while it runs."""
        size = len(raw)
        graph = self._graphs.get(size)
        if graph is None:
            return self._eager(raw)
        self._accelerator.copy(self._input[:size], raw)
        graph.replay()
        return graph.output
