"""Compares a built checkpoint with the shipped one, by bytes or vectors, and a measured table with the model card."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from recipes.photo_zh.checkpoint import Checkpoint
from recipes.photo_zh.tables import UNKNOWN, read_vocabulary

MIN_COSINE: Final = 0.9999
IGNORED: Final = frozenset({"MODEL_CARD.md"})
"""Written by hand, not built."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two checkpoint folders differ."""

    different_files: tuple[str, ...]
    """Empty: they are the same, byte for byte."""
    words: float = 1.0
    """The least cosine between both vectors of a word."""
    photos: float = 1.0

    @property
    def is_equal(self) -> bool:
        """Whether both answer alike."""
        return not self.different_files or min(self.words, self.photos) >= MIN_COSINE

    def __str__(self) -> str:
        """One line."""
        if not self.different_files:
            return "byte-equal: every file is the shipped one"
        how = "vector-equal" if self.is_equal else "DIFFERENT"
        return (
            f"{how}: least cosine with the shipped model {self.words:.6f} over all words, {self.photos:.6f} over the "
            f"sample photographs (at least {MIN_COSINE} wanted); other bytes in {', '.join(self.different_files)}"
        )


def compare(built: Path, shipped: Path, samples: Path) -> Comparison:
    """Compare two folders, by their bytes first and by all words and the sample photographs where bytes differ."""
    names = sorted({path.name for folder in (built, shipped) for path in folder.iterdir()} - IGNORED)
    _, mismatch, missing = filecmp.cmpfiles(built, shipped, names, shallow=False)
    different = tuple(sorted([*mismatch, *missing]))
    if not different:
        return Comparison(())
    words = [*read_vocabulary().words, *UNKNOWN]
    photos = list(sample_photos(samples))
    both = [Checkpoint(folder) for folder in (built, shipped)]
    texts = [checkpoint.encode_texts(words) for checkpoint in both]
    images = [checkpoint.encode_images(photos) for checkpoint in both]
    least = [float(np.sum(a * b, axis=1).min()) for a, b in (texts, images)]
    return Comparison(different, *least)


def lines_not_in_card(table: str, card: str) -> list[str]:
    """The lines of a measured table that a model card does not hold."""
    known = set(card.splitlines())
    return [line for line in table.splitlines() if line not in known]


def sample_photos(folder: Path) -> Iterable[Image.Image]:
    """The sample photographs that can be opened, upright and in RGB."""
    for entry in json.loads((folder / "samples.json").read_text(encoding="utf-8")):
        if entry["error"] is None:
            with Image.open(folder / entry["file"]) as image:
                yield ImageOps.exif_transpose(image).convert("RGB")
