"""Tags by the rules of a label set of version 2: limits of each label, exclusive groups, parents, and a last resort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np

from shiwu.contract import Request, Tag
from shiwu_worker.jobs.label_rules import NO_LIMIT, LabelRules, RuleTables
from shiwu_worker.stages.score.ranking import smallest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_set import LabelSet

DIGITS: Final = 6
"""Decimals of all numbers of a tag."""
Floats = TypeVar("Floats", np.float32, np.float64)


def rule_tags(
    cosines: NDArray[np.float32],
    scores: NDArray[np.float32],
    label_set: LabelSet,
    rules: LabelRules,
    requests: Sequence[Request | None],
) -> list[tuple[Tag, ...]]:
    """The labels that each image gets: highest z first with the head z, otherwise highest cosine first.

    Args:
        cosines, scores: of each image and label, (n, m).
        requests: of each image; its `top_k` bounds the labels that pass by themselves, parents come in addition.
    """
    tables, has_z = rules.tables, label_set.head == "z"
    z = None if tables.means is None else (cosines - tables.means) / tables.deviations
    p = None if z is None or tables.slopes is None else sigmoid(tables.slopes * z + tables.offsets)
    rank = z if has_z and z is not None else cosines
    values = _Values(scores, cosines, p, z if has_z else None)
    passing = _passing(values, tables, requests)
    passing &= tables.can_be_given & _winners(rank, tables)
    keys = np.where(passing, -rank, np.inf)
    most = [request.top_k if request else 0 for request in requests]
    best, counts = smallest(keys, max(most, default=0)), np.minimum(passing.sum(axis=1), most)
    if tables.parents:
        given = np.zeros(cosines.shape, bool)
        np.put_along_axis(given, best, np.arange(best.shape[1]) < counts[:, None], axis=1)
        for child, parent in tables.parents:
            given[:, parent] |= given[:, child]
        counts = given.sum(axis=1)
        best = smallest(np.where(given, -rank, np.inf), int(counts.max(initial=0)))
    chosen: list[list[int]] = [row[:count] for row, count in zip(best.tolist(), counts.tolist(), strict=True)]
    if rules.unknown is not None:
        chosen = [row or [rules.unknown] * bool(wanted) for row, wanted in zip(chosen, most, strict=True)]
    return [_tags(values, row, columns, label_set.words, rules.groups) for row, columns in enumerate(chosen)]


class _Values(NamedTuple):
    """What is known of each image and label, (n, m)."""

    scores: NDArray[np.float32]
    cosines: NDArray[np.float32]
    p: NDArray[np.float64] | None
    z: NDArray[np.float64] | None


def _passing(values: _Values, tables: RuleTables, requests: Sequence[Request | None]) -> NDArray[np.bool_]:
    """Whether each label passes its limits, or those that the request brings instead, (n, m)."""
    scores, cosines, p, z = values
    has_p = np.zeros(cosines.shape[1], bool) if tables.slopes is None else ~np.isnan(tables.slopes)
    decided = has_p if z is not None else np.ones_like(has_p)
    """Labels that a probability or a score decides, so that a threshold of the request applies."""
    shape = (len(requests), cosines.shape[1])
    least, least_z = np.broadcast_to(tables.least, shape), np.broadcast_to(tables.least_z, shape)
    own_cosines = [None if request is None else request.min_cosine for request in requests]
    thresholds = np.array([request.threshold if request else 0.0 for request in requests])
    if thresholds.any():
        replaces = (thresholds > 0)[:, None] & decided
        least = np.where(replaces, thresholds[:, None], least)
        least_z = np.where(replaces, NO_LIMIT, least_z)
    passing = np.ones(shape, bool)
    if any(each is not None for each in own_cosines):
        is_own = np.array([each is not None for each in own_cosines])[:, None]
        passing &= cosines >= np.array([NO_LIMIT if each is None else each for each in own_cosines])[:, None]
        least = np.where(is_own & (thresholds == 0)[:, None], NO_LIMIT, least)
        least_z = np.where(is_own, NO_LIMIT, least_z)
    compared = scores.astype(np.float64) if p is None else np.where(has_p, p, scores)
    passing &= (compared >= least) | ~decided
    if z is not None:
        passing &= z >= least_z
    return passing


def _winners(rank: NDArray[np.float32] | NDArray[np.float64], tables: RuleTables) -> NDArray[np.bool_]:
    """Whether each label is the best of its exclusive group, as are those that it brings, (n, m).

    The best is chosen before any limit, so a stricter limit never lets another label of the group in.
    """
    wins = np.ones(rank.shape, bool)
    for columns in tables.exclusive:
        wins[:, columns] = False
        np.put_along_axis(wins, columns[rank[:, columns].argmax(axis=1)][:, None], True, axis=1)
    for child, parent in reversed(tables.parents):
        wins[:, child] &= wins[:, parent]
    return wins


def _tags(
    values: _Values, row: int, columns: Sequence[int], words: Sequence[str], groups: Sequence[str | None]
) -> tuple[Tag, ...]:
    scores, cosines, p, z = values
    return tuple(
        Tag(
            words[column],
            round(float(scores[row, column]), DIGITS),
            round(float(cosines[row, column]), DIGITS),
            p=None if p is None or np.isnan(p[row, column]) else round(float(p[row, column]), DIGITS),
            z=None if z is None else round(float(z[row, column]), DIGITS),
            group=groups[column],
        )
        for column in columns
    )


def sigmoid(values: NDArray[Floats]) -> NDArray[Floats]:
    """1 / (1 + e^-x) of each value."""
    # Two forms of the function, each used where its exponential cannot overflow.
    small = np.exp(-np.abs(values))
    found: NDArray[Floats] = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return found
