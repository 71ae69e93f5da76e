"""`shiwu-worker --size`: the cores, loaders, memory and batch size that a GPU needs for images of a kind.

Core-milliseconds are measured (docs/performance.md). Rates of GPUs are computed from the data sheets of the makers; no
GPU has confirmed them yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import click
from rich.console import Console
from rich.table import Table

VIT_B_16_GFLOP: Final = 35.13
"""Operations for one image with ViT-B/16, for which the rates are estimated."""
ELEMENTWISE_MB: Final = 137.0
"""Memory traffic of one image between the matrix products of ViT-B/16, in FP16, without fused kernels."""
MATRIX_EFFICIENCY: Final = 0.53
BANDWIDTH_EFFICIENCY: Final = 0.83
FETCH_CORE_MS: Final = 0.34
"""For one object from S3 with obstore."""
MESSAGE_CORE_MS: Final = 0.09
"""In the worker process: messages and a log line."""
MIN_LOADERS: Final = 2
"""So that others load while one is replaced."""
PROCESS_CORES: Final = 1
"""For the threads of a worker process."""
BASE_GIB: Final = 6.0
"""A worker process with torch, CUDA, ViT-B/16, pinned memory and 1 GiB of shared memory."""
LOADER_GIB: Final = 0.3
"""A loader with its sandbox while it decodes an image of 50 megapixels."""


@dataclass(frozen=True, slots=True)
class GpuKind:
    """A kind of GPU.

    Args:
        tflops: dense FP16 rate with FP32 sums that it keeps up within its power limit, in TFLOP/s.
        gb_s: memory bandwidth in GB/s.
        batch: largest batch that is worth its latency.
    """

    title: str
    tflops: float
    gb_s: float
    memory_gb: int
    batch: int

    @property
    def estimated_rate(self) -> float:
        """Images a second of ViT-B/16 in FP16, as an estimate."""
        product_s = VIT_B_16_GFLOP / 1000 / (MATRIX_EFFICIENCY * self.tflops)
        elementwise_s = ELEMENTWISE_MB / 1000 / (BANDWIDTH_EFFICIENCY * self.gb_s)
        return 1 / (product_s + elementwise_s)


GPU_KINDS: Final = {
    # 70, 72 and 150 W: they lower their clock under load, so 0.6 and 0.8 of the data sheet is taken.
    "t4": GpuKind("T4", 39, 320, 16, 64),
    "l4": GpuKind("L4", 73, 300, 24, 64),
    "a10": GpuKind("A10", 100, 600, 24, 64),
    "a100": GpuKind("A100 80 GB", 312, 2039, 80, 128),
    "h100": GpuKind("H100 SXM", 989, 3350, 80, 256),
    "h200": GpuKind("H200", 989, 4800, 141, 256),
    # Slices of an H200: of its 132 multiprocessors 16 and 32, of its memory an eighth and a quarter.
    "mig-1g": GpuKind("H200 MIG 1g.18gb", 120, 600, 18, 64),
    "mig-2g": GpuKind("H200 MIG 2g.35gb", 240, 1200, 35, 64),
}
PICTURES: Final = {
    "512px": 1.66,
    "2mp": 7.90,
    "12mp": 34.4,
    "png-2mp": 40.2,
    "webp-2mp": 42.2,
    "avif-2mp": 50.1,
}
"""Core-milliseconds from bytes to pixels, measured on an AMD EPYC with AVX2. JPEG unless another format is named."""


@dataclass(frozen=True, slots=True)
class Size:
    """What one GPU needs; `gpus` of them do `rate` images a second."""

    gpu: GpuKind
    rate: float
    """Images a second of all GPUs."""
    gpus: int
    loaders: int
    cores: int
    memory_gib: int

    @property
    def rate_per_gpu(self) -> float:
        """Images a second of one GPU."""
        return self.rate / self.gpus


def size_of(gpu: GpuKind, *, decode_core_ms: float, rate: float | None = None) -> Size:
    """Cores, loaders and memory for each GPU.

    Args:
        decode_core_ms: core-milliseconds to decode an image.
        rate: images a second in total; None for what one GPU is estimated to do.

    Raises:
        ValueError: `rate` is not above 0.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"expected a rate above 0 images/s, got {rate:g}")
    wanted = gpu.estimated_rate if rate is None else rate
    gpus = max(1, math.ceil(wanted / gpu.estimated_rate))
    each_s = wanted / gpus / 1000
    loaders = max(MIN_LOADERS, math.ceil(each_s * (decode_core_ms + FETCH_CORE_MS)))
    cores = loaders + max(PROCESS_CORES, math.ceil(each_s * MESSAGE_CORE_MS))
    memory_gib = 2 * math.ceil((BASE_GIB + LOADER_GIB * loaders) / 2)
    return Size(gpu, wanted, gpus, loaders, cores, memory_gib)


def docs_table() -> str:
    """The table of docs/operations.md, in Markdown."""
    needs_of = ": loaders, cores, memory"
    head = f"| GPU | its memory | images/s, estimated | 512 px{needs_of} | 2 MP{needs_of} | largest batch |"
    lines = [head, "|---|---|---|---|---|---|"]
    for gpu in GPU_KINDS.values():
        small, large = (size_of(gpu, decode_core_ms=PICTURES[name]) for name in ("512px", "2mp"))
        needs = [f"{size.loaders}, {size.cores}, {size.memory_gib}Gi" for size in (small, large)]
        rate = f"{_rounded(gpu.estimated_rate):,}"
        lines.append(f"| {gpu.title} | {gpu.memory_gb} GB | {rate} | {needs[0]} | {needs[1]} | {gpu.batch} |")
    return "\n".join(lines)


def _rounded(rate: float) -> int:
    """Two digits: more would promise what an estimate cannot keep."""
    return int(float(f"{rate:.2g}"))


def run_size(*, card: str | None, picture: str, rate: float | None) -> int:
    """Print the size for one card or for all, and the chart's values for one; return the exit code."""
    names = list(GPU_KINDS) if card is None else [card]
    sizes = {name: size_of(GPU_KINDS[name], decode_core_ms=PICTURES[picture], rate=rate) for name in names}
    table = Table("GPU", "images/s", "GPUs", "loaders", "cores", "memory", "largest batch", title="For each GPU")
    for size in sizes.values():
        table.add_row(
            size.gpu.title,
            f"{_rounded(size.rate_per_gpu):,}",
            str(size.gpus),
            str(size.loaders),
            str(size.cores),
            f"{size.memory_gib}Gi",
            str(size.gpu.batch),
        )
    Console(markup=False, emoji=False, highlight=False).print(table)
    click.echo(
        f"{picture} from S3 with obstore: {PICTURES[picture]} + {FETCH_CORE_MS} core-ms for an image, measured. Rates "
        "of GPUs are estimates for ViT-B/16 in FP16, computed from data sheets: no GPU has confirmed them yet. Measure "
        "yours with shiwu-worker --tune, and pass it as --rate."
    )
    if card is not None:
        click.echo(_chart_values(sizes[card]))
    return 0


def _chart_values(size: Size) -> str:
    """The values of the Helm chart, for one pod with one GPU."""
    return "\n".join(
        (
            "",
            "worker:",
            f"  replicas: {size.gpus}",
            f"  loaders: {size.loaders}",
            f"  maxBatch: {size.gpu.batch}",
            "  resources:",
            f'    requests: {{cpu: "{size.cores}", memory: {size.memory_gib}Gi}}',
            f"    limits: {{memory: {size.memory_gib}Gi}}",
            "s3: {client: obstore}",
        )
    )
