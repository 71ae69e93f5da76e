"""Chooses templates for a label set by measurement on one half of the images, and measures them on the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shiwu_worker.calibration.intervals import Interval, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

CANDIDATES: Final = (
    "{}",
    "一张{}的照片",
    "照片里有{}",
    "这是{}",
    "画面的主体是{}",
    "{}的特写",
    "手机随手拍的{}",
    "图中可以看到{}",
    "远处的{}",
    "室内的{}",
    "户外拍到的{}",
    "一幅关于{}的图片",
)
"""Sentences in which Chinese captions name a thing."""
LEAST_GAIN: Final = 0.001
"""Of the mean average precision, for which one more template is taken."""


@dataclass(frozen=True, eq=False)
class KnownImages:
    """Images whose labels are known."""

    vectors: NDArray[np.float32]
    """Unit vectors (n, d)."""
    is_true: NDArray[np.bool_]
    """Which of the labels each image shows, (n, m)."""
    sources: Sequence[str]

    def take(self, rows: Sequence[int]) -> KnownImages:
        """Some of the images."""
        chosen = list(rows)
        return KnownImages(self.vectors[chosen], self.is_true[chosen], [self.sources[row] for row in chosen])

    def halves(self, *, seed: int) -> tuple[KnownImages, KnownImages, bool]:
        """Two halves, the second kept aside; and whether no source is in both.

        A source goes whole into one half, because its images resemble each other. Images of one source are divided one
        by one.
        """
        names = sorted(set(self.sources))
        is_by_source = len(names) > 1
        groups: dict[str, list[int]] = {}
        for row, source in enumerate(self.sources):
            groups.setdefault(source if is_by_source else str(row), []).append(row)
        keys = sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode(errors="surrogatepass")).digest())
        # The largest sources first, so that the halves are nearly equal.
        parts: tuple[list[int], list[int]] = ([], [])
        for key in sorted(keys, key=lambda key: -len(groups[key])):
            min(parts, key=len).extend(groups[key])
        return self.take(sorted(parts[0])), self.take(sorted(parts[1])), is_by_source


@dataclass(frozen=True, slots=True)
class TemplateQuality:
    """How well labels in some templates rank images."""

    average_precision: float
    """Mean over the labels that an image shows; 0 where no image shows any."""
    first_right: Interval | None
    """Share of the images with labels whose nearest label is one of them; None without such images."""


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """Some templates, measured on both halves."""

    templates: tuple[str, ...]
    chosen_on: TemplateQuality
    aside: TemplateQuality


@dataclass(frozen=True, slots=True)
class TunedTemplates:
    """What was measured, and what was chosen."""

    own: TemplateRow
    """The templates that the set has."""
    single: tuple[TemplateRow, ...]
    chosen: TemplateRow
    images: int
    images_aside: int
    is_by_source: bool
    gained: int
    """Images kept aside whose nearest label becomes right with the chosen templates."""
    lost: int
    """The same that becomes wrong."""

    @property
    def is_better(self) -> bool:
        """Whether the chosen templates help on the images kept aside."""
        before, after = self.own.aside, self.chosen.aside
        return after.average_precision > before.average_precision and self.gained >= self.lost


def tune_templates(
    images: KnownImages,
    labels: Mapping[str, NDArray[np.float32]],
    *,
    own: Sequence[str],
    seed: int,
) -> TunedTemplates:
    """Add templates one by one, the best first, while the mean average precision on one half grows.

    Args:
        labels: template → unit vectors (m, d) of the labels in it, for the candidates and the set's own templates.
        own: the templates that the set has.

    Raises:
        ValueError: a half has no image with any of the labels.
    """
    half, aside, is_by_source = images.halves(seed=seed)
    if not half.is_true.any() or not aside.is_true.any():
        raise ValueError("expected images with labels of the set in both halves; bring more images, or another --seed")

    def row(templates: Sequence[str]) -> TemplateRow:
        vectors = mean_vectors([labels[template] for template in templates])
        return TemplateRow(tuple(templates), quality(half, vectors), quality(aside, vectors))

    chosen = _choose(half, labels)
    right_before = _is_first_right(aside, mean_vectors([labels[template] for template in own]))
    right_after = _is_first_right(aside, mean_vectors([labels[template] for template in chosen]))
    return TunedTemplates(
        own=row(own),
        single=tuple(row([template]) for template in labels),
        chosen=row(chosen),
        images=len(half.vectors),
        images_aside=len(aside.vectors),
        is_by_source=is_by_source,
        gained=int((right_after & ~right_before).sum()),
        lost=int((right_before & ~right_after).sum()),
    )


def _choose(half: KnownImages, labels: Mapping[str, NDArray[np.float32]]) -> list[str]:
    chosen: list[str] = []
    best = 0.0
    while rest := [template for template in labels if template not in chosen]:
        found = {
            template: quality(half, mean_vectors([labels[each] for each in [*chosen, template]])).average_precision
            for template in rest
        }
        first = max(rest, key=lambda template: found[template])
        if chosen and found[first] < best + LEAST_GAIN:
            break
        chosen.append(first)
        best = found[first]
    return chosen


def mean_vectors(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The vectors of labels in several templates, as a worker makes them: averaged, and unit vectors again."""
    total = np.sum(parts, axis=0)
    vectors: NDArray[np.float32] = (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def quality(images: KnownImages, labels: NDArray[np.float32]) -> TemplateQuality:
    """Measure label vectors (m, d) on images."""
    cosines = images.vectors @ labels.T
    has_labels = images.is_true.any(axis=1)
    right = _is_first_right(images, labels)
    return TemplateQuality(
        average_precision=float(average_precisions(cosines, images.is_true).mean()) if has_labels.any() else 0.0,
        first_right=wilson(int(right.sum()), int(has_labels.sum())) if has_labels.any() else None,
    )


def average_precisions(cosines: NDArray[np.floating[Any]], is_true: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision of each label that an image shows: cosines and truth are (n, m), the result has up to m."""
    shown = is_true.any(axis=0)
    order = np.argsort(-cosines[:, shown], axis=0, kind="stable")
    ranked = np.take_along_axis(is_true[:, shown], order, axis=0)
    precisions = np.cumsum(ranked, axis=0) / np.arange(1, len(ranked) + 1)[:, None]
    result: NDArray[np.float64] = (precisions * ranked).sum(axis=0) / ranked.sum(axis=0)
    return result


def _is_first_right(images: KnownImages, labels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """For each image whether its nearest label is right."""
    nearest = (images.vectors @ labels.T).argmax(axis=1)
    right: NDArray[np.bool_] = images.is_true[np.arange(len(nearest)), nearest]
    return right
