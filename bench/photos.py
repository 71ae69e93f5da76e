"""Images with the statistics of photographs, made from noise: broad colours, edges, fine grain.

A decoder's time depends on size and on bits a pixel: these have about 2 of them as JPEG, as cameras' images do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tests.support.pictures import saved

from bench.cache import made_once

SizeName = Literal["512", "2mp", "12mp"]
SIZES: Final[dict[SizeName, tuple[int, int]]] = {"512": (512, 512), "2mp": (1632, 1224), "12mp": (4000, 3000)}
SIZE_NAMES: Final = ("512", "2mp", "12mp")
JPEG: Final = {"quality": 85, "subsampling": "4:2:0"}
RECIPE: Final = 1
"""Raised when the images change, so that no old ones are taken from the cache."""
_OCTAVES: Final = ((5, 70.0), (17, 35.0), (61, 16.0), (211, 8.0))
"""Cells across the image, and the strength of their noise in levels."""
_SHAPES: Final = 24
_GRAIN_LEVELS: Final = 6.0

FORMATS: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "JPEG": lambda image: saved(image, "JPEG", **JPEG),
    "progressive JPEG": lambda image: saved(image, "JPEG", **JPEG, progressive=True),
    "PNG": lambda image: saved(image, "PNG", compress_level=1),
    "WebP": lambda image: saved(image, "WEBP", quality=85, method=1),
    "GIF": lambda image: saved(image.quantize(256, method=Image.Quantize.FASTOCTREE), "GIF"),
    "AVIF": lambda image: saved(image, "AVIF", quality=75, speed=10),
}


def photo(size: SizeName, *, seed: int) -> Image.Image:
    """Return one image; the same seed gives the same image."""
    width, height = SIZES[size]
    chance = np.random.default_rng([RECIPE, seed, width])
    broad = np.full((height, width, 3), 118.0, np.float32)
    for cells, levels in _OCTAVES:
        broad += _noise(chance, cells, (width, height)) * np.float32(levels)
    image = Image.fromarray(broad.clip(0, 255).astype(np.uint8))
    _draw_shapes(image, chance)
    # Grain is of brightness, the same in all three channels, as a sensor's is after its denoising.
    grain = chance.standard_normal((height, width, 1), np.float32) * np.float32(_GRAIN_LEVELS)
    return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))


def jpeg_files(size: SizeName, *, count: int) -> list[Path]:
    """Return `count` JPEG files of one size; they are made once."""

    def make(folder: Path) -> None:
        for number in range(count):
            (folder / f"{number:03}.jpg").write_bytes(FORMATS["JPEG"](photo(size, seed=number)))

    return sorted(made_once(f"photos{RECIPE}-{size}-{count}", make).glob("*.jpg"))


def bits_per_pixel(size: SizeName, data: bytes) -> float:
    """Return bits per pixel, which decide how much a decoder has to read."""
    width, height = SIZES[size]
    return 8 * len(data) / (width * height)


def _noise(chance: np.random.Generator, cells: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth noise around 0, enlarged from a few cells; a third of it is colour."""
    width, height = size
    down = max(2, cells * height // width)
    grey = chance.standard_normal((down, cells), np.float32)
    colour = chance.standard_normal((down, cells, 3), np.float32) / 3
    channels = [
        np.asarray(Image.fromarray(grey + colour[..., i]).resize(size, Image.Resampling.BICUBIC)) for i in range(3)
    ]
    return np.stack(channels, axis=-1)


def _draw_shapes(image: Image.Image, chance: np.random.Generator) -> None:
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for number in range(_SHAPES):
        x, y = int(chance.integers(width)), int(chance.integers(height))
        reach = int(chance.integers(width // 40, width // 5))
        colour = tuple(int(level) for level in chance.integers(20, 236, 3))
        box = (x, y, x + reach, y + int(reach * chance.uniform(0.4, 1.6)))
        if number % 3 == 0:
            draw.ellipse(box, fill=colour)
        elif number % 3 == 1:
            draw.rectangle(box, outline=colour, width=max(2, width // 200))
        else:
            corners = [
                (x + int(chance.integers(-reach, reach)), y + int(chance.integers(-reach, reach))) for _ in "abc"
            ]
            draw.polygon(corners, fill=colour)
