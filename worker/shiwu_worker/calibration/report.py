"""What a report on a label set says: scores of each label and of all, curves, confusions, and the worst mistakes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from shiwu_worker.calibration.intervals import Interval, wilson
from shiwu_worker.calibration.templates import average_precisions

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CONFUSIONS: Final = 30
MistakeKind: TypeAlias = Literal["false", "missed"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Precision, recall and their harmonic mean F1, each 0 to 1; None where there is nothing to divide by."""

    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One label."""

    label: str
    images: int
    """Images that show it."""
    given: int
    """Images that get it."""
    scores: Scores


@dataclass(frozen=True, slots=True)
class Mistake:
    """A label that an image got without showing it, or shows without getting it."""

    image: int
    """Its row."""
    kind: MistakeKind
    label: str
    by: float
    """How far the cosine lies on the wrong side."""


@dataclass(frozen=True, eq=False)
class Report:
    """All that a page shows."""

    labels: tuple[LabelRow, ...]
    micro: Scores
    """Over all pairs of an image and a label."""
    macro: Scores
    """Mean over the labels that an image shows."""
    unknown: Interval
    """Share of the images that get no label."""
    false_tags: Interval | None
    """Share of the images without any label of the set that get one; None without such images."""
    confusions: tuple[tuple[str, str, int], ...]
    """A label that images show and do not get, one that they get instead, and how many; the most frequent first."""
    mistakes: tuple[Mistake, ...]
    """The worst mistake of each image that has one, the worst first."""
    is_true: NDArray[np.bool_]
    """(n, m)."""
    is_given: NDArray[np.bool_]
    ranking: NDArray[np.float64]
    """What images are ranked by for curves, (n, m): cosines, with limits what they exceed the limit by."""
    margins: NDArray[np.float64]
    """How far each cosine exceeds the limit of its label, or, without limits, the nearest other label."""


def make_report(
    cosines: NDArray[np.float32],
    words: Sequence[str],
    truth: Sequence[Collection[str]],
    *,
    min_cosines: NDArray[np.float64] | None,
) -> Report:
    """Compare the labels of images with the truth.

    Args:
        cosines: of each image and label, (n, m), n and m at least 1.
        truth: the labels that each image shows (n); others than `words` are ignored.
        min_cosines: the least cosine of each label, (m); None if the nearest label of each image counts as given.
    """
    is_true = np.array([[word in shown for word in words] for shown in truth], bool).reshape(len(truth), len(words))
    margins = _margins(cosines, min_cosines)
    is_given: NDArray[np.bool_] = margins >= 0
    ranking = margins if min_cosines is not None else cosines.astype(np.float64)
    is_without = ~is_true.any(axis=1)
    rows = tuple(_row(column, words[column], cosines, is_true, is_given) for column in range(len(words)))
    pooled = average_precisions(ranking.reshape(-1, 1), is_true.reshape(-1, 1))
    got: NDArray[np.bool_] = np.asarray(is_given.any(axis=1))
    return Report(
        labels=rows,
        micro=_scores(is_true, is_given, float(pooled[0]) if len(pooled) else None),
        macro=_mean([row.scores for row in rows if row.images]),
        unknown=wilson(int((~got).sum()), len(got)),
        false_tags=wilson(int(got[is_without].sum()), int(is_without.sum())) if is_without.any() else None,
        confusions=_confusions(words, is_true, is_given),
        mistakes=_mistakes(words, margins, is_true, is_given),
        is_true=is_true,
        is_given=is_given,
        ranking=ranking,
        margins=margins,
    )


def precision_recall(ranking: NDArray[np.float64], is_true: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The curve over all limits, (points, 2) of recall and precision: one point after each true one of (n)."""
    ranked = is_true[np.argsort(-ranking, kind="stable")]
    places = np.flatnonzero(ranked)
    found = np.arange(1, len(places) + 1)
    curve: NDArray[np.float64] = np.stack([found / max(len(places), 1), found / (places + 1)], axis=1)
    return curve


def _margins(cosines: NDArray[np.float32], min_cosines: NDArray[np.float64] | None) -> NDArray[np.float64]:
    exact = cosines.astype(np.float64)
    if min_cosines is not None:
        return exact - min_cosines
    if exact.shape[1] == 1:
        return np.zeros_like(exact)
    order = np.argsort(-exact, axis=1, kind="stable")
    first, second = (np.take_along_axis(exact, order[:, [place]], axis=1) for place in (0, 1))
    # Of equal cosines the first label counts, as in answers.
    margins = np.minimum(exact - first, -np.finfo(np.float64).tiny)
    np.put_along_axis(margins, order[:, [0]], first - second, axis=1)
    return margins


def _row(
    column: int,
    word: str,
    cosines: NDArray[np.float32],
    is_true: NDArray[np.bool_],
    is_given: NDArray[np.bool_],
) -> LabelRow:
    true, given = is_true[:, column], is_given[:, column]
    precisions = average_precisions(cosines[:, [column]], is_true[:, [column]])
    scores = _scores(true, given, float(precisions[0]) if len(precisions) else None)
    return LabelRow(label=word, images=int(true.sum()), given=int(given.sum()), scores=scores)


def _scores(true: NDArray[np.bool_], given: NDArray[np.bool_], average_precision: float | None) -> Scores:
    right, shown, got = int((true & given).sum()), int(true.sum()), int(given.sum())
    return Scores(
        precision=right / got if got else None,
        recall=right / shown if shown else None,
        f1=2 * right / (shown + got) if shown else None,
        average_precision=average_precision,
    )


def _mean(scores: Sequence[Scores]) -> Scores:
    """The mean of each; a label that is never given has no precision and counts as 0."""
    if not scores:
        return Scores(None, None, None, None)
    names = ("precision", "recall", "f1", "average_precision")
    return Scores(*(float(np.mean([getattr(one, name) or 0.0 for one in scores])) for name in names))


def _confusions(
    words: Sequence[str], is_true: NDArray[np.bool_], is_given: NDArray[np.bool_]
) -> tuple[tuple[str, str, int], ...]:
    counts = (is_true & ~is_given).T.astype(np.int64) @ (is_given & ~is_true).astype(np.int64)
    pairs = [(words[a], words[b], int(counts[a, b])) for a, b in zip(*np.nonzero(counts), strict=True)]
    return tuple(sorted(pairs, key=lambda pair: -pair[2])[:MAX_CONFUSIONS])


def _mistakes(
    words: Sequence[str], margins: NDArray[np.float64], is_true: NDArray[np.bool_], is_given: NDArray[np.bool_]
) -> tuple[Mistake, ...]:
    by = np.where(is_true != is_given, np.abs(margins), -1.0)
    worst = by.argmax(axis=1)
    found = [
        Mistake(row, "missed" if is_true[row, column] else "false", words[column], float(by[row, column]))
        for row, column in enumerate(worst.tolist())
        if by[row, column] >= 0
    ]
    return tuple(sorted(found, key=lambda mistake: -mistake.by))
