"""The image tower at fixed batch sizes: uint8 images on the device → unit vectors on the device.

Three ways to run the same arithmetic: eager, compiled (CPU), or one CUDA graph per batch size, replayed without Python
between its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.checkpoint import unit_vectors

log: FilteringBoundLogger = structlog.get_logger()
Tower = Callable[[torch.Tensor], torch.Tensor]
WARM_RUNS: Final = 3
"""Runs before a graph is captured: libraries choose their kernels in the first runs, which a graph must not record."""
MAX_COMPILED_SIZES: Final = 16


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
    gain = torch.tensor([rescale / s for s in std], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, 3, 1, 1)

    def run(raw: torch.Tensor) -> torch.Tensor:
        pixels = (raw.permute(0, 3, 1, 2).float() * gain + shift).to(dtype)
        return unit_vectors(model.get_image_features(pixel_values=pixels))

    return run


def compiled_tower(eager: Tower) -> Tower:
    """Compiled by inductor with frozen weights; the first run of each batch size takes 15 to 60 s."""
    from torch._inductor import config  # noqa: PLC0415 the import takes a second

    config.freezing = True
    # Each size is one program; above dynamo's default limit of 8 further sizes would silently run eager.
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SIZES
    compiled: Tower = torch.compile(eager, dynamic=False)
    return compiled


class GraphedTower:
    """One CUDA graph per batch size, all in one memory pool. A size that cannot be captured runs eager.

    Not thread-safe. The next run of the same size overwrites the output, so the caller copies it on the same stream.
    """

    def __init__(
        self, eager: Tower, *, batch_sizes: Sequence[int], shape: tuple[int, int, int], stream: torch.cuda.Stream
    ) -> None:
        self._eager = eager
        self._stream = stream
        self._input = torch.zeros((max(batch_sizes), *shape), dtype=torch.uint8, device=stream.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the smaller ones then fit into its memory.
        for size in sorted(batch_sizes, reverse=True):
            try:
                self._graphs[size] = self._capture(size, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                text = str(error)[:300]
                log.warning("graph_not_captured", batch_size=size, error=text, meaning="this batch size runs eager")

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """The batch sizes that have a graph."""
        return tuple(sorted(self._graphs))

    def _capture(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        raw = self._input[:size]
        with torch.cuda.stream(self._stream), torch.inference_mode():
            for _ in range(WARM_RUNS):
                self._eager(raw)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                vectors = self._eager(raw)
        return graph, vectors

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Run on the current stream, which must be the stream of the capture."""
        size = len(raw)
        if size not in self._graphs:
            return self._eager(raw)
        graph, vectors = self._graphs[size]
        self._input[:size].copy_(raw, non_blocking=True)
        graph.replay()
        return vectors
