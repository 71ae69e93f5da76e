"""Decoding of JPEGs by the GPU's own hardware, through torchvision: rates, and differences from Pillow's pixels."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from bench.card.measure import Measures, Skipped
from bench.photos import SizeName, jpeg_files

SECONDS: Final = 3.0


def measures(*, tiny: bool) -> Measures:
    """Both sizes of images, in several batch sizes and numbers of threads."""
    sizes: tuple[SizeName, ...] = ("512",) if tiny else ("512", "2mp")
    for size in sizes:
        for batch, threads in ((2, 1),) if tiny else ((64, 1), (256, 1), (64, 4)):
            yield f"{size}, {batch} × {threads} threads, images/s", partial(_rate, size, batch, threads, tiny=tiny)
        yield f"{size}, levels off Pillow", partial(_levels, size)


def _decode(data: list[torch.Tensor]) -> list[torch.Tensor]:
    """Decode on the GPU where there is one.

    Raises:
        Skipped: torchvision is missing.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-not-found]  # noqa: PLC0415 it may be missing
    except ImportError:
        raise Skipped("needs torchvision") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[torch.Tensor] = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
    return found


def _files(size: SizeName, count: int) -> list[torch.Tensor]:
    data = [np.frombuffer(path.read_bytes(), np.uint8).copy() for path in jpeg_files(size, count=4)]
    return [torch.from_numpy(data[number % len(data)]) for number in range(count)]


def _rate(size: SizeName, batch: int, threads: int, *, tiny: bool) -> float:
    files = _files(size, batch)
    _decode(files)
    seconds = 0.05 if tiny else SECONDS
    began_s = time.monotonic()

    def work() -> int:
        count = 0
        while time.monotonic() - began_s < seconds:
            _decode(files)
            count += batch
        return count

    with ThreadPoolExecutor(threads) as pool:
        counts = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return round(sum(counts) / (time.monotonic() - began_s), 1)


def _levels(size: SizeName) -> dict[str, Any]:
    files = _files(size, 4)
    found = [image.permute(1, 2, 0).cpu().numpy().astype(np.int16) for image in _decode(files)]
    expected = [np.asarray(Image.open(io.BytesIO(file.numpy().tobytes())), np.int16) for file in files]
    off = [np.abs(one - other) for one, other in zip(found, expected, strict=True)]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "decoded on": where,
        "most": int(max(each.max() for each in off)),
        "mean": round(float(np.mean([each.mean() for each in off])), 4),
    }
