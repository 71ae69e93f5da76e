"""`shiwu-worker --tune`: what this machine can do with this model, and what settings follow; kept in SHIWU_TUNE_FILE.

A worker finds its largest batch at each start anyway. What it can't find while it starts is how many loaders keep the
device busy; and a tuned start saves the search.
"""

from __future__ import annotations

import io
import math
import sys
import time
from typing import Any, Final

import click
import numpy as np
import structlog
from PIL import Image
from rich.console import Console
from rich.table import Table

from shiwu_worker.checkpoints.model_files import model_folder, model_revision
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import KNOBS, Tuned, key_of
from shiwu_worker.config.types import check_output_file
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.decoder import DecodeLimits, decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec

log: Any = structlog.get_logger()
SIDE: Final = 512
DECODED_FOR_S: Final = 1.0
BUSY: Final = 0.8
"""Share of a loader's core that decoding may take; fetching takes the rest."""


def run_tune() -> int:
    """Measure, print, and write the file where one is named; say first whether the result will be kept."""
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    settings = load_settings_or_exit()
    try:
        told = _where_kept(settings)
        click.echo(f"{told} Measuring takes 10 to 60 s; let the machine be idle meanwhile.", err=True)
        folder = model_folder(settings.model)
        spec = read_image_spec(folder)
        encoder = load_encoder(settings, folder, spec, is_thorough=True)
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    table = Table("batch", "ms", "pictures/s", title=f"{encoder.info.id}, {encoder.info.dtype}, {encoder.info.device}")
    for rung, seconds in _measured_s(encoder).items():
        table.add_row(str(rung), f"{seconds * 1000:.1f}", f"{rung / seconds:.1f}")
    console.print(table)
    decode_s = decode_core_s(spec)
    found = choose(settings, encoder, decode_s, model_revision(folder))
    console.print(f"decoding a {SIDE} px JPEG takes {decode_s * 1000:.2f} core-ms")
    for name in KNOBS:
        console.print(f"SHIWU_{name.upper()}={getattr(found, name)}")
    if settings.tune_file is not None:
        settings.tune_file.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {settings.tune_file}: workers with the same SHIWU_TUNE_FILE take it", soft_wrap=True)
    else:
        console.print("set these in the environment of the workers of this machine, or run --tune with SHIWU_TUNE_FILE")
    return 0


def _where_kept(settings: Settings) -> str:
    """What will become of the result.

    Raises:
        FatalError: the file cannot be written, which is better known before measuring.
    """
    if settings.tune_file is None:
        return "SHIWU_TUNE_FILE is not set: the result is printed, and no file keeps it."
    try:
        check_output_file(settings.tune_file)
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, f"SHIWU_TUNE_FILE: {error}") from error
    return f"The result will be kept in {settings.tune_file}."


def choose(settings: Settings, encoder: Any, decode_s: float, revision: str) -> Tuned:
    """As many loaders as keep the model busy with pictures of this size, and a core for the worker itself."""
    rate = max(rung / seconds for rung, seconds in _measured_s(encoder).items())
    cores = usable_cores()
    wanted = math.ceil(rate * decode_s / BUSY)
    return Tuned(
        key=key_of(settings, revision),
        max_batch=encoder.size_policy.largest,
        torch_threads=encoder.threads,
        loaders=settings.loaders or min(max(1, wanted), max(1, cores - 1)),
    )


def _measured_s(encoder: Any) -> dict[int, float]:
    """Seconds of one batch of each size that was measured."""
    return {size: seconds for size, seconds in encoder.size_policy.seconds().items() if size in encoder.timed_sizes}


def decode_core_s(spec: ImageSpec) -> float:
    """Core-seconds of a JPEG of the usual size, the best of as many as fit into a second."""
    grain = np.random.default_rng(0).integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    limits = DecodeLimits(max_pixels=SIDE * SIDE, max_side=SIDE, formats=("JPEG",))
    until_s, best_s = time.monotonic() + DECODED_FOR_S, math.inf
    while time.monotonic() < until_s:
        began_s = time.thread_time()
        decode(buffer.getvalue(), spec=spec, limits=limits)
        best_s = min(best_s, time.thread_time() - began_s)
    return best_s
