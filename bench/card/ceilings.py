"""What the GPU can do at most: copies, matrix products of a ViT's shapes, attention, graph launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.card.measure import Measures, need_cuda
from shiwu_worker.stages.encode.accelerator import gather_rows

TOKENS: Final = 197
"""Of ViT-B/16 at 224 pixels."""
PRODUCTS: Final = {
    "attention out 768→768": (768, 768),
    "qkv 768→2304": (768, 2304),
    "mlp in 768→3072": (768, 3072),
    "mlp out 3072→768": (3072, 768),
    "odd 1152→4304": (1152, 4304),
}
BATCHES: Final = (1, 8, 64, 128, 256, 512)
IMAGE_BYTES: Final = 224 * 224 * 3
NODES: Final = 200
"""Kernels in the graph whose launch is timed; a ViT-B/16 has about as many."""


def measures(*, tiny: bool) -> Measures:
    """All ceilings."""
    batches = (1, 2) if tiny else BATCHES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in batches:
        yield f"host to device, {size} images, GB/s", partial(_copy, size, to_device=True)
        yield f"device to host, {size} images, GB/s", partial(_copy, size, to_device=False)
    for name, shape in PRODUCTS.items():
        yield f"product {name}, TFLOP/s", partial(_products, shape, batches, device)
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        yield f"attention {backend}, ms", partial(_attention, backend, batches, device)
    yield "gathering 64 images on the host, GB/s", partial(_gather, 8 if tiny else 64)
    yield f"launch of a graph of {NODES} kernels, µs", _graph_launch


def timed_ms(work: Callable[[], object], *, repeats: int) -> float:
    """Median milliseconds of a call, which the device has ended; the first calls are not counted."""
    for _ in range(2):
        work()
    if not torch.cuda.is_available():
        took = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            work()
            took.append((time.perf_counter() - began_s) * 1000)
        return statistics.median(took)
    pairs = []
    for _ in range(repeats):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
        begun.record()
        work()
        ended.record()
        pairs.append((begun, ended))
    torch.cuda.synchronize()
    return float(statistics.median(begun.elapsed_time(ended) for begun, ended in pairs))


def _copy(size: int, *, to_device: bool) -> float:
    need_cuda()
    host = torch.zeros(size * IMAGE_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(size * IMAGE_BYTES, dtype=torch.uint8, device="cuda")
    target, source = (device, host) if to_device else (host, device)
    ms = timed_ms(lambda: target.copy_(source, non_blocking=True), repeats=30)
    return round(size * IMAGE_BYTES / ms / 1e6, 2)


def _products(shape: tuple[int, int], batches: tuple[int, ...], device: str) -> dict[str, float]:
    inner, columns = shape
    dtype = torch.float16 if device == "cuda" else torch.float32
    # Random numbers: products of zeros are faster.
    weights = torch.randn(inner, columns, device=device, dtype=dtype)
    found = {}
    for size in batches:
        rows = size * TOKENS
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        ms = timed_ms(lambda left=left: left @ weights, repeats=20 if device == "cuda" else 1)  # type: ignore[misc]  # mypy finds no type for the default
        found[str(size)] = round(2 * rows * inner * columns / ms / 1e9, 2)
    return found


def _attention(backend: str, batches: tuple[int, ...], device: str) -> dict[str, float]:
    if backend != "MATH":
        need_cuda()
    dtype = torch.float16 if device == "cuda" else torch.float32
    found: dict[str, float] = {}
    with sdpa_kernel(getattr(SDPBackend, backend)), torch.inference_mode():
        for size in batches:
            query, key, value = (torch.randn(size, 12, TOKENS, 64, device=device, dtype=dtype) for _ in range(3))
            work = partial(scaled_dot_product_attention, query, key, value)
            found[str(size)] = round(timed_ms(work, repeats=20 if device == "cuda" else 1), 4)
    return found


def _gather(size: int) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * size, 224, 224, 3), np.uint8)
    target = np.empty((size, 224, 224, 3), np.uint8)
    rows: list[int] = np.random.default_rng(1).permutation(2 * size)[:size].tolist()
    took = []
    for _ in range(5):
        began_s = time.perf_counter()
        gather_rows(target, pixels, rows)
        took.append(time.perf_counter() - began_s)
    return round(target.nbytes / min(took) / 1e9, 2)


def _graph_launch() -> dict[str, float]:
    need_cuda()
    vector = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    vector += 1
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(NODES):
            vector += 1
    device_ms = timed_ms(graph.replay, repeats=50)
    began_s = time.perf_counter()
    for _ in range(50):
        graph.replay()
    host_us = (time.perf_counter() - began_s) / 50 * 1e6
    torch.cuda.synchronize()
    return {"on the device": round(device_ms * 1000, 1), "on the host": round(host_us, 1)}
