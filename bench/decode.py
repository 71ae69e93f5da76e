"""Core-milliseconds of one image from bytes to the model's pixels, and the error of these pixels.

shiwu's two paths are compared with transformers' own processor, as the reference script uses it; its pixels are the
reference.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

import shiwu_worker
from bench.charts import Chart, Series
from bench.checkpoints import CLIP_MEAN, CLIP_STD, processor_folder
from bench.machine import named
from bench.photos import FORMATS, SIZE_NAMES, SIZES, SizeName, bits_per_pixel, photo
from bench.report import Headline, Report, Table, median, number, ratio
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import DRAFT_FACTOR, decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec

LIMITS: Final = DecodeLimits(max_pixels=50_000_000, max_side=65_535, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))
MIN_REPEATS: Final = 3
FAST: Final = "shiwu"
EXACT: Final = "shiwu, exact"
PROCESSOR: Final = "transformers' processor"
WAYS: Final = (FAST, EXACT, PROCESSOR)
SQUASH: Final = "squash"
CROP: Final = "crop"
"""As CLIP and photo-zh: the shortest edge is resized to the model's size, and the middle cut out."""
PHOTO_ZH: Final = Path(shiwu_worker.__file__).parent / "data/photo_zh"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """One preprocessing, in the terms of shiwu and of transformers."""

    name: str
    formats: tuple[str, ...]
    """Those that are measured with it."""
    spec: ImageSpec
    processor: Any


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost and error of one way to make the pixels of one image."""

    way: str
    least_ms: float
    median_ms: float
    times: int
    max_levels: int
    """Largest difference to the processor's pixels, of 255."""
    mean_levels: float


@dataclass(frozen=True, slots=True)
class Case:
    """One file with one preprocessing."""

    size: str
    format: str
    preprocessing: str
    kilobytes: float
    bits_per_pixel: float
    decoder_ms: float
    """Least cost of Pillow's decoder alone, for a JPEG at the reduced size that shiwu uses: the lower bound."""
    costs: tuple[Cost, ...]

    @property
    def name(self) -> str:
        """Names the preprocessing only where it is not the usual one."""
        return f"{self.size}, {self.format}" + (f", {self.preprocessing}" if self.preprocessing != SQUASH else "")

    def least_ms(self, way: str) -> float:
        """Return the least cost of this way."""
        return next(cost.least_ms for cost in self.costs if cost.way == way)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    sizes: tuple[str, ...]
    formats: tuple[str, ...]
    seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--sizes", help=f"of {','.join(SIZE_NAMES)}; default: all")
    parser.add_argument("--formats", help=f"of {','.join(FORMATS)}; default: all")
    parser.add_argument("--seconds", type=float, help="for each way and file; default 2")


def run(asked: argparse.Namespace) -> Report:
    """Decode every format in every size in three ways."""
    options = Options(
        quick=asked.quick,
        sizes=tuple(asked.sizes.split(",")) if asked.sizes else SIZE_NAMES[: 1 if asked.quick else None],
        formats=tuple(asked.formats.split(",")) if asked.formats else tuple(FORMATS),
        seconds=asked.seconds or (0.1 if asked.quick else 2.0),
    )
    if unknown := [*(set(options.sizes) - SIZES.keys()), *(set(options.formats) - FORMATS.keys())]:
        raise SystemExit(f"expected sizes of {', '.join(SIZES)} and formats of {', '.join(FORMATS)}, got {unknown}")
    return _report(options, Figures(tuple(_cases(options))))


def _cases(options: Options) -> Iterator[Case]:
    preprocessings = _preprocessings(options)
    for size in (name for name in SIZE_NAMES if name in options.sizes):
        image = photo(size, seed=0)
        files = {name: FORMATS[name](image) for name in options.formats}
        for way in preprocessings:
            for name in way.formats:
                case = _case(size, name, files[name], way, seconds=options.seconds)
                costs = ", ".join(f"{cost.way} {number(cost.least_ms)} ms" for cost in case.costs)
                print(f"  {case.name}: {costs}", flush=True)
                yield case


def _preprocessings(options: Options) -> tuple[Preprocessing, ...]:
    squash, crop = (
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")
        for folder in (processor_folder(), PHOTO_ZH)
    )
    squashed = ImageSpec(224, 224, "squash", None, 3, CLIP_MEAN, CLIP_STD)
    # Crop and squash differ in the reduced size of a JPEG and in the resize; the other decoders do the same for both.
    jpeg = tuple(name for name in options.formats if name == "JPEG")
    return (
        Preprocessing(SQUASH, options.formats, squashed, squash),
        Preprocessing(CROP, jpeg, read_image_spec(PHOTO_ZH), crop),
    )


def _case(size: SizeName, name: str, data: bytes, way: Preprocessing, *, seconds: float) -> Case:
    costs = _costs(data, way.spec, way.processor, seconds=seconds)
    decoder_ms = min(_times_ms(partial(_decoded, data, way.spec), seconds=seconds))
    return Case(size, name, way.name, len(data) / 1000, bits_per_pixel(size, data), decoder_ms, costs)


def _costs(data: bytes, spec: ImageSpec, processor: Any, *, seconds: float) -> tuple[Cost, ...]:
    fast = partial(decode, data, spec=spec, limits=LIMITS)
    exact = partial(fast, is_exact=True)
    reference = _processed(processor, data, do_rescale=False, do_normalize=False).transpose(1, 2, 0)
    return (
        _cost(FAST, fast, fast()[0], reference, seconds),
        _cost(EXACT, exact, exact()[0], reference, seconds),
        _cost(PROCESSOR, partial(_processed, processor, data), reference, reference, seconds),
    )


def _processed(processor: Any, data: bytes, **options: bool) -> NDArray[Any]:
    """Process as the reference script does: open, convert, resize, rescale, normalise."""
    with Image.open(io.BytesIO(data)) as image:
        # As numpy: torch's helper threads would count as the processor's time.
        pixels: NDArray[Any] = processor(images=image.convert("RGB"), return_tensors="np", **options)["pixel_values"][0]
    return pixels


def _decoded(data: bytes, spec: ImageSpec) -> None:
    with Image.open(io.BytesIO(data)) as image:
        edge = DRAFT_FACTOR * max(spec.width, spec.height, spec.shortest_edge or 0)
        image.draft("RGB", (edge, edge))
        image.load()


def _times_ms(work: Callable[[], object], *, seconds: float) -> list[float]:
    """Return the CPU milliseconds of each call, after one that is not counted."""
    work()
    took_ms: list[float] = []
    until_s = time.monotonic() + seconds
    while len(took_ms) < MIN_REPEATS or time.monotonic() < until_s:
        # CPU of the process, not of the thread: AVIF's decoder works in threads of its own.
        began_s = time.process_time()
        work()
        took_ms.append((time.process_time() - began_s) * 1000)
    return took_ms


def _cost(way: str, work: Callable[[], object], pixels: NDArray[Any], reference: NDArray[Any], seconds: float) -> Cost:
    took_ms = _times_ms(work, seconds=seconds)
    levels = np.abs(pixels.astype(np.float32) - reference.astype(np.float32))
    return Cost(
        way=way,
        least_ms=min(took_ms),
        median_ms=median(took_ms),
        times=len(took_ms),
        max_levels=round(float(levels.max())),
        mean_levels=float(levels.mean()),
    )


def _report(options: Options, figures: Figures) -> Report:
    rows = tuple(
        (
            case.name,
            number(case.kilobytes),
            *(f"{number(cost.least_ms)} / {number(cost.median_ms)}" for cost in case.costs),
            number(case.decoder_ms),
            f"{ratio(case.least_ms(PROCESSOR), case.least_ms(FAST)):.1f}",
            *(f"{cost.max_levels} / {cost.mean_levels:.2f}" for cost in case.costs[:2]),
        )
        for case in figures.cases
    )
    head = (
        "file",
        "kB",
        *(f"{way}, ms" for way in WAYS),
        "decoder alone",
        "shiwu is × as fast",
        "levels off, max / mean",
        "exact",
    )
    jpegs = [case for case in figures.cases if case.format == "JPEG"]
    names = tuple(case.name for case in figures.cases)
    series = tuple(Series(way, tuple(case.least_ms(way) for case in figures.cases)) for way in WAYS)
    headlines = [
        Headline(case.name.replace(", JPEG", " JPEG"), case.least_ms(FAST), "core-ms", "less") for case in jpegs
    ]
    headlines += [
        Headline(
            f"{case.name.replace(', JPEG', ' JPEG')}, processor ÷ shiwu",
            ratio(case.least_ms(PROCESSOR), case.least_ms(FAST)),
            "times",
            "more",
        )
        for case in jpegs
    ]
    return Report(
        name="decode",
        headlines=tuple(headlines),
        tables=(Table("Core-milliseconds from bytes to 224 × 224, least / median", head, rows),),
        charts=(Chart("from bytes to 224 × 224, least of many", names, series, "core-ms", is_log=True),),
        figures=figures,
        settings=options,
        notes=(
            f"{named('pillow', 'transformers', 'cykooz-resizer', 'numpy')}; levels are of 255, against the processor's",
            "shiwu also reads EXIF and computes the SHA-256; its pixels stay uint8, the processor's are normalised",
        ),
    )
