"""The image tower at fixed batch sizes: uint8 pictures on the device → unit vectors on the device.

Three ways to run the same arithmetic: eager, compiled (CPU), or one CUDA graph for each size, replayed without Python
between its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import torch

from shiwu_worker.stages.encode.checkpoint import unit_vectors

log: Any = structlog.get_logger()
Tower = Callable[[torch.Tensor], torch.Tensor]
WARM_RUNS: Final = 3
"""Libraries choose their kernels in the first runs; a graph must not capture that."""


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

    (x · rescale - mean) / std is one multiplication and one addition in FP32; after the projection all is FP32 again.
    """
    gain = torch.tensor([rescale / s for s in std], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, 3, 1, 1)

    def run(raw: torch.Tensor) -> torch.Tensor:
        pixels = (raw.permute(0, 3, 1, 2).float() * gain + shift).to(dtype)
        return unit_vectors(model.get_image_features(pixel_values=pixels))

    return run


def compiled_tower(eager: Tower) -> Tower:
    """Compiled by inductor with frozen weights: each size takes it 15 to 60 s at its first run."""
    from torch._inductor import config  # noqa: PLC0415 it takes a second to import

    config.freezing = True
    # One size is one program; past dynamo's limit of 8 sizes it would silently run eager.
    torch._dynamo.config.recompile_limit = 16
    compiled: Tower = torch.compile(eager, dynamic=False)
    return compiled


class GraphedTower:
    """One CUDA graph for each batch size, in one pool of memory. A size that can't be captured runs eager.

    Not thread-safe, and its output is overwritten by the next run of the same size: copy it on the same stream.
    """

    def __init__(self, eager: Tower, *, rungs: Sequence[int], shape: tuple[int, int, int], stream: Any) -> None:
        self._eager = eager
        self._stream = stream
        self._input = torch.zeros((max(rungs), *shape), dtype=torch.uint8, device=stream.device)
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the smaller ones then live in its memory.
        for rung in sorted(rungs, reverse=True):
            try:
                self._graphs[rung] = self._capture(rung, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning(
                    "graph_not_captured", batch_size=rung, error=str(error)[:300], meaning="this size runs eager"
                )

    @property
    def rungs(self) -> tuple[int, ...]:
        """The sizes that have a graph."""
        return tuple(sorted(self._graphs))

    def _capture(self, rung: int, pool: Any) -> tuple[Any, torch.Tensor]:
        raw = self._input[:rung]
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
        rung = len(raw)
        if rung not in self._graphs:
            return self._eager(raw)
        graph, vectors = self._graphs[rung]
        self._input[:rung].copy_(raw, non_blocking=True)
        graph.replay()
        return vectors
