"""`shiwu-worker --tune`: measures model and decoding on this machine and writes settings to SHIWU_TUNE_FILE.

A worker learns its largest batch by itself. The number of loaders that keep the device busy it cannot learn while it
starts, and a tune file saves the search for the batch size.
"""

from __future__ import annotations

import io
import math
import sys
import time
from typing import TYPE_CHECKING, Final

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from shiwu_worker.checkpoints.model_files import model_folder, model_revision
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import TUNED_SETTINGS, Tuned, key_of
from shiwu_worker.config.types import check_output_file
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec

if TYPE_CHECKING:
    from shiwu_worker.stages.encode.encoder import Encoder

SIDE_PIXELS: Final = 512
MEASURE_DECODE_S: Final = 1.0
MAX_DECODE_SHARE: Final = 0.8
"""Share of a loader's core for decoding; the rest is for fetching."""


def run_tune() -> int:
    """Measure, print the settings, and write them to SHIWU_TUNE_FILE if it is set; return the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
    settings = load_settings_or_exit()
    try:
        destination = _destination(settings)
        click.echo(f"{destination} Measuring takes 10 to 60 s; keep the machine idle until then.", err=True)
        folder = model_folder(settings.model)
        spec = read_image_spec(folder)
        encoder = load_encoder(settings, folder, spec, is_thorough=True)
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    table = Table("batch", "ms", "images/s", title=f"{encoder.info.id}, {encoder.info.dtype}, {encoder.info.device}")
    for size, seconds in _measured_s(encoder).items():
        table.add_row(str(size), f"{seconds * 1000:.1f}", f"{size / seconds:.1f}")
    console.print(table)
    decode_s = decode_core_s(spec)
    tuned = choose(settings, encoder, decode_s, model_revision(folder))
    console.print(f"decoding a {SIDE_PIXELS} px JPEG takes {decode_s * 1000:.2f} core-ms")
    for name in TUNED_SETTINGS:
        console.print(f"SHIWU_{name.upper()}={getattr(tuned, name)}")
    if settings.tune_file is not None:
        settings.tune_file.write_text(tuned.model_dump_json(indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {settings.tune_file}: workers with the same SHIWU_TUNE_FILE use it", soft_wrap=True)
    else:
        console.print("set these in the environment of the workers of this machine, or run --tune with SHIWU_TUNE_FILE")
    return 0


def _destination(settings: Settings) -> str:
    """Return a sentence that says where the result goes.

    Raises:
        FatalError: the file cannot be written; checked before the measurement.
    """
    if settings.tune_file is None:
        return "SHIWU_TUNE_FILE is not set: the result is only printed."
    try:
        check_output_file(settings.tune_file)
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, f"SHIWU_TUNE_FILE: {error}") from error
    return f"The result will be written to {settings.tune_file}."


def choose(settings: Settings, encoder: Encoder, decode_s: float, revision: str) -> Tuned:
    """Choose as many loaders as keep the model busy with images of this size, leaving a core for the worker."""
    rate = max(size / seconds for size, seconds in _measured_s(encoder).items())
    cores = usable_cores()
    wanted = math.ceil(rate * decode_s / MAX_DECODE_SHARE)
    return Tuned(
        key=key_of(settings, revision),
        max_batch=encoder.size_policy.largest,
        torch_threads=encoder.threads,
        loaders=settings.loaders or min(max(1, wanted), max(1, cores - 1)),
    )


def _measured_s(encoder: Encoder) -> dict[int, float]:
    """Return the seconds of one batch for each measured size."""
    return {size: seconds for size, seconds in encoder.size_policy.seconds().items() if size in encoder.timed_sizes}


def decode_core_s(spec: ImageSpec) -> float:
    """Return the core-seconds to decode a JPEG of SIDE_PIXELS, the lowest of those measured in a second."""
    grain = np.random.default_rng(0).integers(0, 256, (SIDE_PIXELS // 8, SIDE_PIXELS // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    limits = DecodeLimits(max_pixels=SIDE_PIXELS**2, max_side=SIDE_PIXELS, formats=("JPEG",))
    until_s, best_s = time.monotonic() + MEASURE_DECODE_S, math.inf
    while time.monotonic() < until_s:
        began_s = time.thread_time()
        decode(buffer.getvalue(), spec=spec, limits=limits)
        best_s = min(best_s, time.thread_time() - began_s)
    return best_s
