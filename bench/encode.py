"""The model alone: batch sizes × dtypes × ways of running it, and the share of the device's own matrix rate.

The ways are those that the encoder offers: every switch of its constructor, alone, beside none of them ("eager").
"""

from __future__ import annotations

import argparse
import gc
import inspect
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from bench import bare
from bench.bare import BatchSizeRate
from bench.charts import Chart, Series
from bench.checkpoints import NAMES, Checkpoint, checkpoint
from bench.report import Headline, Report, Table, number, ratio
from shiwu_worker.config.types import FUSIONS
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.encode.device import choose_device, choose_dtypes
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions

MATRIX: Final = {"cpu": 2048, "cuda": 8192}
"""Rows and columns: large enough that the rate is the device's best."""
MATRIX_S: Final = 2.0
EAGER: Final = "eager"
_PREFIX: Final = re.compile("^(is|has|use)_")


@dataclass(frozen=True, slots=True)
class Way:
    """One dtype, run in one way, at every batch size."""

    dtype: str
    mode: str
    start_s: float
    """Time to load, capture or compile, and warm up."""
    cosine_min: float
    """The worst image's cosine to the first way's vectors: FP32, eager."""
    memory_gib: float
    """Peak memory allocated on a GPU."""
    rungs: tuple[BatchSizeRate, ...]
    matrix_share: tuple[float, ...]
    """For each batch size: arithmetic per second ÷ the matrix rate in this dtype."""


@dataclass(frozen=True, slots=True)
class MatrixRate:
    """Matrix rate of the device."""

    dtype: str
    tflops: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    device: str
    gflop_per_picture: float
    matrix: tuple[MatrixRate, ...]
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    model: str
    device: str
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    rungs: tuple[int, ...]
    seconds: float
    threads: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--model", default="vit-b-16", help=f"{', '.join(NAMES)}, or a folder; default %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; default: the first GPU where there is one")
    parser.add_argument("--dtypes", help="float32,bfloat16,float16; default: those that the device is good at")
    parser.add_argument("--modes", help=f"of {', '.join(modes('cuda'))}; default: all that the device can do")
    parser.add_argument("--rungs", help="batch sizes; default 1,2,4,8,16,32,64")
    parser.add_argument("--seconds", type=float, help="for each batch size; default 3")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of torch on a CPU; default: all cores")


def modes(device: str) -> dict[str, dict[str, Any]]:
    """Return the encoder's switches: name → its options. CUDA graphs need CUDA.

    `unfused` has none of the steps that make the image tower faster. On CUDA `graphs` has all of them, and each step
    has its own mode.
    """
    parameters = inspect.signature(EncoderOptions).parameters.values()
    switches = [
        parameter.name
        for parameter in parameters
        if isinstance(parameter.default, bool) or parameter.annotation in {"bool", bool}
    ]
    off = dict.fromkeys(switches, False)
    if device != "cuda":
        usable = [name for name in switches if "graph" not in name]
        return {
            EAGER: off,
            "unfused": off | {"fusions": ()},
            **{_PREFIX.sub("", name): off | {name: True} for name in usable},
        }
    graphs: dict[str, Any] = off | {"has_graphs": True}
    steps = {"unfused": (), **{step: (step,) for step in FUSIONS}}
    return {
        EAGER: off,
        "graphs": graphs,
        "compiled": graphs | {"is_compiled": True},
        **{name: graphs | {"fusions": taken} for name, taken in steps.items()},
    }


def run(asked: argparse.Namespace) -> Report:
    """Measure every dtype in every way at every batch size."""
    device = choose_device(asked.device)
    usual = _usual_dtypes(device)
    options = Options(
        quick=asked.quick,
        model=asked.model,
        device=str(device),
        dtypes=tuple(asked.dtypes.split(",")) if asked.dtypes else usual[:1] if asked.quick else usual,
        modes=tuple(asked.modes.split(",")) if asked.modes else tuple(modes(device.type))[: 1 if asked.quick else None],
        rungs=_numbers(asked.rungs or ("1,2" if asked.quick else "1,2,4,8,16,32,64")),
        seconds=asked.seconds or (0.2 if asked.quick else 3.0),
        threads=asked.threads,
    )
    torch.set_num_threads(options.threads)
    model = checkpoint(options.model)
    with ThreadPoolExecutor(1) as pool:  # a thread that ends: its team of OpenMP's would slow the model's
        matrix = tuple(pool.map(partial(_matrix_rate, device), options.dtypes))
    ways: list[Way] = []
    reference: Any = None
    for rate in matrix:
        for mode in options.modes:
            way, vectors = _measure(model, options, mode, rate, reference=reference)
            reference = vectors if reference is None else reference
            ways.append(way)
            best = max(way.rungs, key=lambda rate: rate.per_second)
            print(f"  {rate.dtype}, {mode}: {number(best.per_second)} pictures/s at {best.size}", flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {options.threads} threads"
    return _report(options, Figures(name, model.gflop, matrix, tuple(ways)), model)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(part) for part in text.split(",")))


def _usual_dtypes(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("float32", "bfloat16", "float16")
    best = str(choose_dtypes("auto", device)[0]).removeprefix("torch.")
    return tuple(dict.fromkeys(("float32", best)))


def _measure(model: Checkpoint, options: Options, mode: str, rate: MatrixRate, *, reference: Any) -> tuple[Way, Any]:
    """Measure one dtype in one way; also return the vectors of a fixed batch, for the cosine."""
    spec = read_image_spec(model.folder)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began_s = time.monotonic()
    encoder = _open(model, options, mode, rate.dtype, spec)
    start_s = time.monotonic() - began_s
    rungs = tuple(bare.loop(encoder, spec, size, seconds=options.seconds) for size in options.rungs)
    pixels = np.random.default_rng(1).integers(0, 256, (options.rungs[-1], spec.height, spec.width, 3), np.uint8)
    vectors = np.array(encoder.encode(pixels))
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    del encoder
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    shares = tuple(ratio(measured.per_second * model.gflop / 1000, rate.tflops) for measured in rungs)
    cosine = float((vectors * (vectors if reference is None else reference)).sum(axis=1).min())
    return Way(rate.dtype, mode, start_s, cosine, memory, rungs, shares), vectors


def _open(model: Checkpoint, options: Options, mode: str, dtype: str, spec: ImageSpec) -> Encoder:
    given: Any = modes(options.device.partition(":")[0])[mode]
    encoder = Encoder(
        EncoderOptions(
            folder=model.folder,
            model_id=model.name,
            revision="bench",
            device=options.device,
            dtype=dtype,
            batch_sizes=options.rungs,
            mean=spec.mean,
            std=spec.std,
            threads=options.threads,
            **given,
        )
    )
    encoder.warm()
    return encoder


def _matrix_rate(device: torch.device, dtype: str) -> MatrixRate:
    """Return the best rate of many square products: 2·n³ operations each."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best_s = min(_product_times(left, right))
    return MatrixRate(dtype, 2 * size**3 / best_s / 1e12)


def _product_times(left: torch.Tensor, right: torch.Tensor) -> Iterator[float]:
    until_s = time.monotonic() + MATRIX_S
    while time.monotonic() < until_s:
        began_s = time.perf_counter()
        left @ right
        if left.is_cuda:
            torch.cuda.synchronize()
        yield time.perf_counter() - began_s


def _report(options: Options, figures: Figures, model: Checkpoint) -> Report:
    peak = {rate.dtype: rate.tflops for rate in figures.matrix}
    rows = tuple(
        (
            f"{way.dtype}, {way.mode}",
            str(rate.size),
            number(rate.batch_ms),
            number(rate.batch_ms / rate.size),
            number(rate.per_second),
            f"{share:.1%}",
        )
        for way in figures.ways
        for rate, share in zip(way.rungs, way.matrix_share, strict=True)
    )
    ways = tuple(
        (
            f"{way.dtype}, {way.mode}",
            number(peak[way.dtype]),
            f"{way.cosine_min:.5f}",
            number(way.start_s),
            number(way.memory_gib) if way.memory_gib else "–",
            f"{_gain(figures, way):.2f}",
        )
        for way in figures.ways
    )
    lines = tuple(
        Series(f"{way.dtype}, {way.mode}", tuple(rate.per_second for rate in way.rungs)) for way in figures.ways
    )
    head = ("dtype and mode", "batch", "ms a batch", "ms a picture", "pictures/s", "of matrix rate")
    about = ("dtype and mode", "matrix TFLOP/s", "cosine, worst", "start s", "GPU GiB", "× first")
    title = f"{model.name} on {figures.device}: {number(model.gflop, 4)} GFLOP a picture"
    chart = Chart(title, tuple(map(float, options.rungs)), lines, "pictures/s", "batch", kind="lines", is_log=True)
    return Report(
        name="encode",
        headlines=tuple(_headlines(figures.ways)),
        tables=(Table(title, head, rows), Table("The ways", about, ways)),
        charts=(chart,),
        figures=figures,
        settings=options,
        model=model.name,
        has_random_weights=model.is_random,
        notes=("the matrix rate is that of the best large product in the same dtype, in this run",),
    )


def _gain(figures: Figures, way: Way) -> float:
    """Return its best rate ÷ the first way's best rate."""
    first, own = (max(rate.per_second for rate in measured.rungs) for measured in (figures.ways[0], way))
    return ratio(own, first)


def _headlines(ways: Sequence[Way]) -> Iterator[Headline]:
    for way in ways:
        name = f"{way.dtype}, {way.mode}"
        best = max(way.rungs, key=lambda rate: rate.per_second)
        yield Headline(f"{name}, best", best.per_second, "pictures/s", "more")
        yield Headline(f"{name}, batch of {way.rungs[0].size}", way.rungs[0].batch_ms, "ms", "less")
