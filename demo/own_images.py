"""Images of the person who runs the demo: `make demo ARGS="my/pictures/"`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from demo.album import Entry
from shiwu_worker.config.types import FORMAT_ALIASES
from shiwu_worker.stages.decode.image_formats import READABLE

SUFFIXES: Final = frozenset(f".{name.lower()}" for name in (*READABLE, *FORMAT_ALIASES))
MAX_IMAGES: Final = 1000


@dataclass(frozen=True, slots=True)
class OwnImages:
    """What was found in the folders of the person who runs the demo."""

    entries: tuple[Entry, ...] = ()
    """Without a known label."""
    folders: tuple[Path, ...] = ()
    """Those that the worker must allow."""
    other_files: int = 0
    """Files whose names are not those of images."""
    too_many: int = 0
    """Images beyond MAX_IMAGES."""

    @property
    def left_out(self) -> str:
        """What is not tagged, as the end of a sentence; empty if nothing is left out."""
        counts = {"other files": self.other_files, f"images beyond the first {MAX_IMAGES}": self.too_many}
        texts = [f"{what} ({count})" for what, count in counts.items() if count]
        return f"; left out: {', '.join(texts)}" if texts else ""

    @property
    def settings(self) -> dict[str, str]:
        """Variables of the worker: these folders, and every format that it can decode on this machine."""
        formats = READABLE - ({"HEIF"} if find_spec("pillow_heif") is None else set())
        return {"SHIWU_ALLOW_FOLDERS": ",".join(map(str, self.folders)), "SHIWU_FORMATS": ",".join(sorted(formats))}


def find_images(paths: Sequence[Path]) -> OwnImages:
    """The images in these folders and their sub-folders, and files that are named themselves, whatever their names.

    Raises:
        ValueError: a folder cannot be named in the worker's settings.
    """
    found: dict[Path, None] = {}
    other_files = 0
    for path in paths:
        for file in _files(path):
            if file == path or file.suffix.lower() in SUFFIXES:
                found[file.resolve()] = None
            else:
                other_files += 1
    images = [*found][:MAX_IMAGES]
    folders = [path.resolve() for path in paths if path.is_dir()]
    # A link in a folder may lead out of it.
    folders += [image.parent for image in images if not any(image.is_relative_to(folder) for folder in folders)]
    if odd := [folder for folder in folders if "," in str(folder)]:
        raise ValueError(f"expected a folder whose path has no comma, got {odd[0]}")
    entries = (Entry(path.as_uri(), path.suffix[1:].upper() or "–", name=path.name, is_own=True) for path in images)
    return OwnImages(tuple(entries), tuple(dict.fromkeys(folders)), other_files, len(found) - len(images))


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder but hidden ones, such as those that macOS adds."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not is_hidden and file.is_file():
            yield file
