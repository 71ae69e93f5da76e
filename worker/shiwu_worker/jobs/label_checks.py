"""Finds the labels that a model cannot read, and the labels that it cannot tell apart.

The label bank turns these findings into warnings of an answer. The start of the worker may refuse a label set by them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAME_DISTANCE: Final = 1e-5
"""Unit vectors that are nearer than this differ by rounding only."""
PROJECTIONS: Final = 4
MAX_NEIGHBOURS: Final = 64
"""How many neighbours in one projection each vector is compared with; equal vectors are neighbours."""


class LabelTokens(NamedTuple):
    """What the model's tokenizer makes of one label, after the cut to the model's length."""

    ids: tuple[int, ...]
    """All token ids, without padding."""
    is_readable: bool
    """False where every token is unknown, special, or a separator of words."""


@dataclass(frozen=True, slots=True)
class LabelFindings:
    """What is wrong with the labels of one set, for one model. Labels stand in the order of the set."""

    unreadable: tuple[str, ...] = ()
    """Labels of which the tokenizer knows no part."""
    alike: tuple[tuple[str, ...], ...] = ()
    """Groups of two or more readable labels with the same token ids or the same vector."""


def check_labels(
    labels: Sequence[str], *, tokens: Sequence[LabelTokens], vectors: NDArray[np.float32]
) -> LabelFindings:
    """Look for unreadable labels and for labels that are alike.

    Args:
        tokens: of each label alone, without a template: `Encoder.label_tokens(labels)`.
        vectors: unit vectors (m, d) of the labels, templates included.
    """
    unreadable = {index for index, one in enumerate(tokens) if not one.is_readable}
    first_with: dict[tuple[int, ...], int] = {}
    same = [(first_with.setdefault(one.ids, index), index) for index, one in enumerate(tokens)]
    groups = _joined(len(labels), [*same, *_equal_pairs(vectors)], without=unreadable)
    return LabelFindings(
        unreadable=tuple(labels[index] for index in sorted(unreadable)),
        alike=tuple(tuple(labels[index] for index in group) for group in groups),
    )


def check_texts(
    labels: Sequence[str], counts: Sequence[int], *, tokens: Sequence[LabelTokens], vectors: NDArray[np.float32]
) -> LabelFindings:
    """The same where a label has several texts: each finding of a text is one of its label.

    Args:
        counts: how many texts each label has; `tokens` and `vectors` are those of the texts.
    """
    names = [label for label, count in zip(labels, counts, strict=True) for _ in range(count)]
    found = check_labels(names, tokens=tokens, vectors=vectors)
    # Two texts of one label may be alike: the best of them counts.
    groups = [tuple(dict.fromkeys(group)) for group in found.alike]
    return LabelFindings(
        unreadable=tuple(dict.fromkeys(found.unreadable)), alike=tuple(group for group in groups if len(group) > 1)
    )


def _joined(count: int, pairs: Sequence[tuple[int, int]], *, without: set[int]) -> list[list[int]]:
    """Groups of two or more numbers below `count` that the pairs connect."""
    parents = list(range(count))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for left, right in pairs:
        if left not in without and right not in without:
            high, low = sorted((root(left), root(right)), reverse=True)
            parents[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(count):
        groups[root(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _equal_pairs(vectors: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs of equal rows that connect all rows that are equal.

    Equal rows have equal projections on any direction, so only neighbours in the order of one projection are compared:
    a set may hold 100,000 labels, too many for a comparison of each with each.
    """
    directions = np.random.default_rng(0).standard_normal((vectors.shape[1], PROJECTIONS))
    projected = vectors @ (directions / np.linalg.norm(directions, axis=0))
    order = np.argsort(projected[:, 0], kind="stable")
    sorted_projected = projected[order]
    pairs: list[tuple[int, int]] = []
    for step in range(1, min(MAX_NEIGHBOURS, len(order) - 1) + 1):
        near = np.abs(sorted_projected[step:] - sorted_projected[:-step]) <= SAME_DISTANCE
        if not near[:, 0].any():
            break
        found = np.flatnonzero(near.all(axis=1))
        left, right = order[found], order[found + step]
        distances = np.linalg.norm(vectors[left].astype(np.float64) - vectors[right], axis=1)
        equal = distances <= SAME_DISTANCE
        pairs += zip(left[equal].tolist(), right[equal].tolist(), strict=True)
    return pairs
