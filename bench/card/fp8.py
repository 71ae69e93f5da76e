"""Matrix products in FP8 with a scale for each row: rate next to FP16, and cosine to FP32."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch

from bench.card.ceilings import PRODUCTS, TOKENS, timed_ms
from bench.card.measure import Measures, need_cuda

BATCHES: Final = (64, 256)
LARGEST: Final = 448.0
"""The largest number of float8_e4m3fn."""


def measures(*, tiny: bool) -> Measures:
    """All shapes of a ViT. The arithmetic of the scales is checked on a CPU too."""
    yield "quantized rows, worst cosine to FP32", _quantized_cosine
    for name, shape in PRODUCTS.items():
        for size in (1,) if tiny else BATCHES:
            yield f"{name}, {size} images", partial(_product, shape, size)


def quantized(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in FP8, and the scale of each row (n, 1)."""
    scales = matrix.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (matrix.float() / scales).to(torch.float8_e4m3fn), scales


def _quantized_cosine() -> float:
    rows = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    small, scales = quantized(rows)
    return round(float(torch.cosine_similarity(small.float() * scales, rows).min()), 6)


def _product(shape: tuple[int, int], size: int) -> dict[str, Any]:
    need_cuda()
    inner, columns = shape
    rows = size * TOKENS
    left = torch.randn(rows, inner, device="cuda", dtype=torch.float16)
    weights = torch.randn(columns, inner, device="cuda", dtype=torch.float16)
    small_left, left_scales = quantized(left)
    small_weights, weight_scales = quantized(weights)

    def in_fp8() -> torch.Tensor:
        return torch._scaled_mm(
            small_left,
            small_weights.t(),
            scale_a=left_scales,
            scale_b=weight_scales.t().contiguous(),
            out_dtype=torch.bfloat16,
        )

    expected = left.float() @ weights.float().t()
    flop = 2 * rows * inner * columns
    return {
        "fp8 TFLOP/s": round(flop / timed_ms(in_fp8, repeats=20) / 1e9, 1),
        "fp16 TFLOP/s": round(flop / timed_ms(lambda: left @ weights.t(), repeats=20) / 1e9, 1),
        "cosine, worst row": round(float(torch.cosine_similarity(in_fp8().float(), expected).min()), 6),
    }
