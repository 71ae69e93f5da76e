"""Images of the person who runs the demo: `make demo ARGS="my/pictures/"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from demo.album import Entry

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff"})
MAX_IMAGES: Final = 1000


def find_images(paths: Sequence[Path]) -> list[Entry]:
    """The images in these folders and their sub-folders, and single files, as entries without a known label."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= dict.fromkeys(one.resolve() for one in inside if one.suffix.lower() in SUFFIXES and one.is_file())
    return [
        Entry(path.as_uri(), path.suffix[1:].upper(), name=path.name, is_own=True) for path in [*found][:MAX_IMAGES]
    ]


def folders_of(paths: Sequence[Path]) -> str:
    """The folders that the worker must allow, as SHIWU_ALLOW_FOLDERS takes them."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    return ",".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
