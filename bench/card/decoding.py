"""What the cores can decode at most: processes that do nothing else, as many as the service has loaders, and all cores.

The service cannot be faster than its loaders decode, so its floor is a share of the first of the two rates.
"""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from typing import Any, Final

from bench.card.measure import Measures
from bench.card.plan import LOADERS
from bench.checkpoints import CLIP_MEAN, CLIP_STD
from bench.photos import jpeg_files
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import ImageSpec

LIMITS: Final = DecodeLimits(max_pixels=50_000_000, max_side=65_535, formats=("JPEG",))
SPEC: Final = ImageSpec(224, 224, "squash", None, 3, CLIP_MEAN, CLIP_STD)
"""As the models of the service steps have it."""
SECONDS: Final = 4.0
START_S: Final = 20.0
IMAGES: Final = 64


def measures(*, tiny: bool) -> Measures:
    """512 px JPEGs, as the service steps have them."""
    for count in (1,) if tiny else sorted({1, LOADERS, usable_cores()}):
        yield f"{count} processes, images/s", partial(_rate, count, tiny=tiny)


def _rate(count: int, *, tiny: bool) -> float:
    files = [path.read_bytes() for path in jpeg_files("512", count=4 if tiny else IMAGES)]
    seconds = 0.2 if tiny else SECONDS
    context = multiprocessing.get_context("fork")
    barrier, rates = context.Barrier(count), context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(files, seconds, barrier, rates), daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(START_S + seconds)
    codes = [process.exitcode for process in processes]
    if any(codes) or None in codes:
        raise RuntimeError(f"expected {count} processes that decode and end, got exit codes {codes}")
    return round(sum(float(rates.get()) for _ in processes), 1)


def _work(files: list[bytes], seconds: float, barrier: Any, rates: Any) -> None:
    decode(files[0], spec=SPEC, limits=LIMITS)
    barrier.wait(START_S)
    began_s, decoded = time.monotonic(), 0
    while time.monotonic() - began_s < seconds:
        decode(files[decoded % len(files)], spec=SPEC, limits=LIMITS)
        decoded += 1
    rates.put(decoded / (time.monotonic() - began_s))
