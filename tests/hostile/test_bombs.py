"""Every bomb through real loaders: none falls, each is answered in time, memory stays in its bound."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import pytest

from tests.support import bombs, pictures
from tests.support.loader_pool import Pool, load_all

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "HEIF")
MEMORY_BYTES: Final = 2 * 1024**3
LIMITS: Final = {
    "max_bytes": 20 * 1024 * 1024,
    "max_pixels": bombs.MAX_PIXELS,
    "max_side": 65_535,
    "formats": FORMATS,
    "memory_bytes": MEMORY_BYTES,
    "is_exact": False,
    "task_timeout_s": 60.0,
}
REFUSED: Final = {
    "webp_pixels": "picture_too_large",
    "webp_frames": "picture_too_large",
    "png_pixels": "picture_too_large",
    "png_line": "picture_too_large",
    "png_apng_count": "picture_too_large",
    "png_chunks": "picture_too_large",
    "jpeg_scans": "picture_too_large",
    "jpeg_pixels": "picture_too_large",
    "jpeg_segments": "picture_too_large",
    "gif_pixels": "picture_too_large",
    "gif_grows": "picture_too_large",
    "tiff_tags": "picture_broken",
    "png_no_pixels": "picture_broken",
}


def test_every_bomb_is_answered(tmp_path: Path) -> None:
    """The one that is promised, within the limits of CPU and time, for no loader is replaced."""
    paths = []
    for name, make in bombs.BOMBS.items():
        (tmp_path / name).write_bytes(make())
        paths.append(tmp_path / name)
    with Pool(tmp_path, processes=1, spares=1, **LIMITS) as pool:
        found = load_all(paths, pool, timeout_s=100)
    assert found.answers == bombs.HARMLESS | REFUSED
    assert found.restarts == 0
    assert found.peak_bytes < MEMORY_BYTES


@pytest.mark.parametrize("seed", [20261125])
def test_broken_files_of_every_kind_are_answered(tmp_path: Path, seed: int) -> None:
    """Good files cut at several places, and with bytes changed at random places: pixels or a stable code."""
    chance = random.Random(seed)
    files = bombs.truncations()
    for name, data in pictures.variants().items():
        if name != "large.jpg":
            for number in range(20):
                files[f"changed-{number}-{name}"] = bombs.changed(data, chance)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with Pool(tmp_path, processes=1, spares=1, **LIMITS) as pool:
        found = load_all([tmp_path / name for name in files], pool, timeout_s=100)
    assert found.answers.keys() == files.keys()
    assert found.restarts == 0
    codes = {"not_a_picture", "picture_broken", "picture_too_large", "picture_unsupported", "picture_invisible"}
    assert found.counts.keys() <= {*FORMATS, *codes}
    cut = {name: answer for name, answer in found.answers.items() if name.startswith(("cut-0.5", "cut-0.05"))}
    assert {name for name, answer in cut.items() if answer not in codes} == set(), "half a picture is never tagged"


def test_ordinary_images_work_alongside_bombs(tmp_path: Path) -> None:
    """Large progressive JPEGs, texts of programs, and every good kind."""
    good = pictures.variants() | {
        "progressive-12mp.jpg": pictures.progressive_jpeg(pictures.picture().resize((4000, 3000))),
        "text.png": bombs.png_with_text(),
        "plain.heic": pictures.heic(pictures.picture()),
    }
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    with Pool(tmp_path, processes=1, **LIMITS) as pool:
        found = load_all([tmp_path / name for name in good], pool, timeout_s=60)
    assert found.counts.keys() <= {*FORMATS}
