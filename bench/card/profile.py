"""Where the GPU's time goes in one pass of the image tower, by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from bench.card.measure import Measures
from bench.card.models import open_encoder, pixels_of

PASSES: Final = 3
LINES: Final = 25
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "products": ("gemm", "cutlass", "nvjet", "xmma", "addmm", "matmul", "linear", "mm"),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "convolution": ("conv", "cudnn"),
    "normalisation": ("layer_norm", "layernorm"),
    "copies": ("memcpy", "memset", "copy"),
    "elementwise": ("elementwise", "vectorized", "sigmoid", "mul", "add", "triton"),
}
"""Kind of a kernel → parts of its name; the first kind that fits is taken, attention before products."""
ORDER: Final = ("attention", "convolution", "normalisation", "products", "copies", "elementwise")


def measures(*, tiny: bool) -> Measures:
    """One pass at a small and a large batch size, operator by operator."""
    for size in (1, 2) if tiny else (1, 64, 256):
        yield f"batch of {size}", partial(_profile, size, tiny=tiny)


def _profile(size: int, *, tiny: bool) -> dict[str, Any]:
    encoder, spec = open_encoder("vit-b-16", sizes=(size,), tiny=tiny, has_graphs=False)
    pixels = pixels_of(spec, size)
    encoder.encode(pixels)
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PASSES):
            encoder.encode(pixels)
    rows = [
        (event.key, event.count // PASSES, _own_us(event, is_cuda=is_cuda) / PASSES)
        for event in profiler.key_averages()
    ]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    shares = dict.fromkeys((*ORDER, "other"), 0.0)
    for name, _, spent_us in rows:
        shares[kind_of(name)] += spent_us
    total = sum(shares.values()) or 1.0
    return {
        "µs of a pass": round(total, 1),
        "shares": {kind: round(spent / total, 3) for kind, spent in shares.items()},
        "kernels": [[name[:120], count, round(spent, 1)] for name, count, spent in rows[:LINES]],
    }


def kind_of(name: str) -> str:
    """The kind of a kernel or an operator by its name."""
    lowered = name.lower()
    return next((kind for kind in ORDER if any(part in lowered for part in KINDS[kind])), "other")


def _own_us(event: Any, *, is_cuda: bool) -> float:
    """Its own time on the device: of kernels on CUDA, of operators on a CPU."""
    if not is_cuda:
        return float(event.self_cpu_time_total)
    is_kernel = "CUDA" in str(event.device_type)
    return float(event.self_device_time_total) if is_kernel else 0.0
