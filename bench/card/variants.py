"""Every way in which the encoder can run a model, as graphs: its rate, its cosine to FP32, and its start."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from bench import bare
from bench.card.measure import Measures, Skipped
from bench.card.models import open_encoder, pixels_of
from bench.encode import modes

COMPILED: Final = "is_compiled"
SIZES: Final = (1, 64, 256)
CHECKED: Final = 8
"""Images whose vectors are compared with those of FP32."""


def measures(*, tiny: bool) -> Measures:
    """Eager, graphs without and with each step that makes the image tower faster, with all of them, and compiled."""
    ways = modes("cuda")
    ways["compiled"] = ways.pop("compiled")  # last, because it takes longest
    for name, options in ways.items():
        yield name, partial(_measure, options, tiny=tiny)


def _measure(options: dict[str, Any], *, tiny: bool) -> dict[str, Any]:
    if options.get(COMPILED) and not torch.cuda.is_available():
        raise Skipped("needs CUDA")
    sizes = (1, 2) if tiny else SIZES
    began_s = time.monotonic()
    encoder, spec = open_encoder("vit-b-16", sizes=sizes, tiny=tiny, **options)
    encoder.warm()
    start_s = time.monotonic() - began_s
    rates = {
        size: bare.loop(encoder, spec, size, seconds=0.02 if tiny else 1.5)
        for size in sizes
        if size in encoder.batch_sizes
    }
    pixels = pixels_of(spec, min(CHECKED, sizes[-1]))
    cosines = np.sum(encoder.encode(pixels) * encoder.encode_exact(pixels), axis=1)
    graphs = getattr(encoder, "_graphs", None)
    found = {
        "start_s": round(start_s, 2),
        "cosine to FP32, worst": round(float(cosines.min()), 6),
        "sizes": list(encoder.batch_sizes),
        "captured": list(graphs.captured_sizes) if graphs is not None else [],
        "images/s": {str(size): round(rate.per_second, 1) for size, rate in rates.items()},
        "ms of a batch alone": {str(size): round(rate.batch_ms, 3) for size, rate in rates.items()},
    }
    del encoder, graphs
    gc.collect()
    if torch.cuda.is_available():
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found
