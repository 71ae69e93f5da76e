"""What a label set does on images whose labels are known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shiwu_worker.calibration.intervals import Interval, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label: how many of its images get it, and how many of the images that get it are its own."""

    label: str
    images: int
    """Images that show it."""
    recall: Interval | None
    """None where no image shows it."""
    precision: Interval | None
    """None where no image gets it."""
    average_precision: float | None
    """Area under the curve of precision and recall over all limits: the mean of the precision at each true image."""
    taken_for: tuple[tuple[str, int], ...]
    """Labels that its images get instead, with the number of images, the most frequent first."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All labels of a set."""

    labels: tuple[LabelScore, ...]
    false_tags: Interval | None
    """Share of the images that show none of the labels, but get a tag; None without such images."""
    kept: Interval | None
    """Share of the true labels of all images that are given; None without any."""


def evaluate(
    cosines: NDArray[np.float32],
    words: Sequence[str],
    truth: Sequence[Collection[str]],
    *,
    min_cosines: NDArray[np.float64] | None = None,
    is_given: NDArray[np.bool_] | None = None,
) -> Evaluation:
    """Compare the tags of images with the truth.

    Args:
        cosines: of each image and label, (n, m).
        words: the labels (m).
        truth: the labels that each image shows (n); others than `words` are ignored.
        min_cosines: the least cosine of each label, (m); without them every label is given.
        is_given: whether each image gets each label (n, m), where something else decides.
    """
    is_true = np.array([[word in shown for word in words] for shown in truth], bool).reshape(len(truth), len(words))
    if is_given is None:
        is_given = np.ones(cosines.shape, bool) if min_cosines is None else cosines >= min_cosines
    is_without_labels = ~is_true.any(axis=1)
    scores = [_score(column, words, cosines, is_true, is_given) for column in range(len(words))]
    return Evaluation(
        labels=tuple(scores),
        false_tags=_share(np.asarray(is_given[is_without_labels].any(axis=1))),
        kept=_share(is_given[is_true]),
    )


def _score(
    column: int,
    words: Sequence[str],
    cosines: NDArray[np.float32],
    is_true: NDArray[np.bool_],
    is_given: NDArray[np.bool_],
) -> LabelScore:
    true, given = is_true[:, column], is_given[:, column]
    missed = is_given[true & ~given] & ~is_true[true & ~given]
    counts = missed.sum(axis=0)
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    return LabelScore(
        label=words[column],
        images=int(true.sum()),
        recall=_share(given[true]),
        precision=_share(true[given]),
        average_precision=_average_precision(cosines[:, column], true),
        taken_for=tuple((words[index], int(counts[index])) for index in order),
    )


def _average_precision(cosines: NDArray[np.float32], true: NDArray[np.bool_]) -> float | None:
    if not true.any():
        return None
    ranked = true[np.argsort(-cosines, kind="stable")]
    precisions = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precisions[ranked].mean())


def _share(flags: NDArray[np.bool_]) -> Interval | None:
    return wilson(int(flags.sum()), len(flags)) if len(flags) else None
