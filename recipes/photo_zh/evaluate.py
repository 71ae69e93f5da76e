"""Measures a checkpoint on photographs that other packages ship, the way a user has it: AutoModel and AutoProcessor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import yaml
from numpy.typing import NDArray

from recipes.packages import unpack
from recipes.photo_zh.build import COMMON_WORDS, ranked_words
from recipes.photo_zh.checkpoint import ROOT, Checkpoint
from recipes.photo_zh.evaluate_texts import Scenes, text_table
from recipes.photo_zh.tables import SIX, UNKNOWN, Photo, Vocabulary, read_photos, read_vocabulary
from recipes.photo_zh.vision import open_photo

EVERYDAY: Final = ROOT / "worker/shiwu_worker/data/label_sets/everyday-zh.yaml"
TOP: Final = 5
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Measured:
    """Photographs and what the checkpoint says about them."""

    vocabulary: Vocabulary
    photos: list[Photo]
    labels: dict[str, list[str]]
    """Label sets by name."""
    logits: dict[str, Logits]
    """For each label set, (photographs, labels)."""
    vectors: NDArray[np.float32]
    """Of the photographs, (n, 320)."""

    def top(self, name: str, index: int, count: int) -> list[str]:
        """The first labels for a photograph."""
        order = np.argsort(-self.logits[name][index])[:count]
        return [self.labels[name][i] for i in order]

    def of(self, split: str, kind: str) -> list[int]:
        """The indices of photographs."""
        return [i for i, photo in enumerate(self.photos) if (photo.split, photo.kind) == (split, kind)]


def evaluate(folder: Path, *, packages: Path) -> str:
    """Two tables, in Markdown: photographs, and texts."""
    checkpoint = Checkpoint(folder)
    measured = measure(checkpoint, packages=packages)
    which = [index for index, photo in enumerate(measured.photos) if photo.kind == "scene"]
    scenes = Scenes(measured.vectors[which], measured.logits["six-zh"][which].max(1))
    texts = text_table(checkpoint, measured.vocabulary, scenes, ranked_words(packages)[COMMON_WORDS:])
    return "\n".join([*table(measured), "", *texts]) + "\n"


def measure(checkpoint: Checkpoint, *, packages: Path) -> Measured:
    """Encode all test photographs and all words. Takes a minute on one core after the packages are there."""
    vocabulary, photos = read_vocabulary(), read_photos()
    everyday = [*yaml.safe_load(EVERYDAY.read_text(encoding="utf-8"))["labels"]]
    labels = {
        "a word for each class": list(dict.fromkeys(vocabulary.own)),
        "everyday-zh": [word for word in everyday if word not in UNKNOWN],
        "photo-zh": list(vocabulary.full),
        "six-zh": list(SIX),
        UNKNOWN[0]: [UNKNOWN[0]],
    }
    images = (open_photo(unpack(photo.package, packages), photo.file) for photo in photos)
    seen = checkpoint.encode_images(images)
    logits = {
        name: (checkpoint.scale * seen @ checkpoint.encode_texts(words).T).astype(np.float32)
        for name, words in labels.items()
    }
    return Measured(vocabulary, photos, labels, logits, seen)


def table(measured: Measured) -> Iterator[str]:
    """The lines of the table. Each label set counts on the photographs that one of its labels is right for."""
    yield "| split | photographs | label set | labels | right first | right among five |"
    yield "|---|---|---|---|---|---|"
    for split, kind in (("report", "scene"), ("choice", "scene"), ("choice", "cutout")):
        here = measured.of(split, kind)
        for name in ("a word for each class", "everyday-zh", "photo-zh"):
            which = [i for i in here if _has_right_word(measured, name, i)]
            first, five = (f"{count} = {count / len(which):.0%}" for count in hits(measured, name, which))
            yield f"| {split} | {len(which)} {kind}s | {name} | {len(measured.labels[name])} | {first} | {five} |"
        yield f"| {split} | {kind}s | six-zh | 6 | {' '.join(_categories(measured, here))} | |"
    yield from _nothing_fits(measured)


def _has_right_word(measured: Measured, name: str, index: int) -> bool:
    """Whether any label of a set is right for a photograph; where none is, the error is not one of the set."""
    answers = measured.photos[index].answers
    return any(measured.vocabulary.is_right(word, answers) for word in measured.labels[name])


def hits(measured: Measured, name: str, which: Sequence[int]) -> tuple[int, int]:
    """How many photographs have a right word first, and among the first five."""
    right = [
        [measured.vocabulary.is_right(word, measured.photos[i].answers) for word in measured.top(name, i, TOP)]
        for i in which
    ]
    return sum(row[0] for row in right), sum(any(row) for row in right)


def _categories(measured: Measured, which: Sequence[int]) -> Iterator[str]:
    """Right of all, for each of the six categories that occurs."""
    known = [(photo.category, measured.top("six-zh", i, 1)[0]) for i in which if (photo := measured.photos[i]).category]
    yield f"{sum(wanted == got for wanted, got in known)}/{len(known)}:"
    for category in SIX:
        got = [answer for wanted, answer in known if wanted == category]
        if got:
            yield f"{category} {got.count(category)}/{len(got)}"


def _nothing_fits(measured: Measured) -> Iterator[str]:
    """How well 未知 and the best logit tell photographs of something from those where no word fits."""
    for name in ("everyday-zh", "a word for each class"):
        best = measured.logits[name].max(1)
        unknown = measured.logits[UNKNOWN[0]][:, 0]
        none, scenes = measured.of("choice", "none"), measured.of("choice", "scene")
        area = area_under_curve(best[scenes], best[none])
        wins = [
            f"{int((best[i] < unknown[i]).sum())} of {len(i)}" for i in (none, scenes, measured.of("report", "scene"))
        ]
        yield (
            f"| choice | {len(none)} where nothing fits | {name} | {len(measured.labels[name])} | 未知 wins {wins[0]} "
            f"(scenes: {wins[1]}, report: {wins[2]}) | area under the curve {area:.2f} |"
        )


def area_under_curve(high: Logits, low: Logits) -> float:
    """How often a value of `high` is above one of `low`; ties count half."""
    pairs = high[:, None] - low[None]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
