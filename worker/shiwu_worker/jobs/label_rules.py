"""What a label set of version 2 adds to its labels: texts, groups, limits and a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Templates: TypeAlias = tuple[str, ...]
Phrase: TypeAlias = tuple[Templates, str]
"""A text in its templates. The model makes one vector of it: the mean over the templates."""
Curve: TypeAlias = tuple[float, float]
"""Slope and offset: the probability of a label is the sigmoid of slope · z + offset (Platt 1999)."""
NO_LIMIT: Final = -np.inf


@dataclass(frozen=True)
class CalibratedLabels:
    """Figures of the labels of a set, measured on images; label by label in its order."""

    digest: str
    """Of everything below."""
    revision: str
    """Of the model whose cosines these are."""
    means: tuple[float, ...]
    """Mean cosine of images without the label."""
    deviations: tuple[float, ...]
    """Their standard deviation, above 0."""
    z: float
    """The least z of a tag that no other limit decides."""
    curves: tuple[Curve | None, ...]
    """None for a label without enough images that show it."""
    thresholds: tuple[float | None, ...]
    """The least probability of a tag at which its precision is as wanted."""


@dataclass(frozen=True)
class LabelRules:
    """Each tuple has an item for each label, in the order of the set."""

    phrases: tuple[tuple[Phrase, ...], ...]
    """The texts of each label; the one with the highest cosine counts."""
    groups: tuple[str | None, ...]
    exclusive: frozenset[str]
    """Groups of which an image gets one label at most."""
    parents: tuple[int | None, ...]
    """The label that an image gets too if it gets this one. There are no cycles."""
    hidden: tuple[bool, ...]
    """Labels that compete with the others and that no image gets."""
    thresholds: tuple[float | None, ...]
    """The least probability of a tag; the least score for a label without a probability."""
    unknown: int | None
    """The label that an image gets if it gets no other."""
    aliases: tuple[tuple[str, ...], ...]
    """Further names of each label; they are no texts and change no score."""
    calibration: CalibratedLabels | None

    def digest_fields(self) -> dict[str, Any]:
        """Everything that changes an answer, in one form for files that mean the same."""
        return {
            # The order of the texts of a label changes nothing, because the best of them counts.
            "texts": [sorted(set(each)) for each in self.phrases],
            "groups": self.groups,
            "exclusive": sorted(self.exclusive.intersection(group for group in self.groups if group is not None)),
            "parents": self.parents,
            "hidden": [index for index, is_hidden in enumerate(self.hidden) if is_hidden and index != self.unknown],
            "thresholds": self.thresholds,
            "unknown": self.unknown,
            "calibration": None if self.calibration is None else self.calibration.digest,
        }

    @cached_property
    def tables(self) -> RuleTables:
        """The rules as arrays."""
        return _tables(self)


class RuleTables(NamedTuple):
    """The rules as scoring needs them; arrays have an item for each label (m)."""

    starts: NDArray[np.intp] | None
    """The first row of each label among the vectors of all texts; None where each label has one text."""
    means: NDArray[np.float64] | None
    deviations: NDArray[np.float64]
    slopes: NDArray[np.float64] | None
    """Not a number for labels without a curve; None if no label has one."""
    offsets: NDArray[np.float64]
    least: NDArray[np.float64]
    """The least probability, or score."""
    least_z: NDArray[np.float64]
    """The least z, for labels that no probability decides."""
    can_be_given: NDArray[np.bool_]
    exclusive: tuple[NDArray[np.intp], ...]
    """The labels of each exclusive group."""
    parents: tuple[tuple[int, int], ...]
    """Pairs of a label and its parent; a label that is a parent comes after its own children."""


def _tables(rules: LabelRules) -> RuleTables:
    count, calibration = len(rules.phrases), rules.calibration
    thresholds = list(rules.thresholds)
    curves: list[Curve | None] = [None] * count
    means, z = None, NO_LIMIT
    deviations = np.ones(count)
    if calibration is not None:
        curves, z = list(calibration.curves), calibration.z
        means, deviations = np.array(calibration.means), np.array(calibration.deviations)
        thresholds = [
            chosen if own is None else own for own, chosen in zip(thresholds, calibration.thresholds, strict=True)
        ]
    least = np.array([NO_LIMIT if each is None else each for each in thresholds])
    has_curve = np.array([each is not None for each in curves])
    lengths = [len(each) for each in rules.phrases]
    can_be_given = ~np.array(rules.hidden, bool)
    if rules.unknown is not None:
        can_be_given[rules.unknown] = False
    return RuleTables(
        starts=None if max(lengths) == 1 else np.cumsum([0, *lengths[:-1]]),
        means=means,
        deviations=deviations,
        slopes=np.array([each[0] if each else np.nan for each in curves]) if has_curve.any() else None,
        offsets=np.array([each[1] if each else np.nan for each in curves]),
        least=least,
        least_z=np.where(has_curve & np.isfinite(least), NO_LIMIT, z),
        can_be_given=can_be_given,
        exclusive=tuple(
            np.array([index for index, group in enumerate(rules.groups) if group == name])
            for name in sorted(rules.exclusive)
            if name in rules.groups
        ),
        parents=_children_first(rules.parents),
    )


def _children_first(parents: tuple[int | None, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of a label and its parent, those that are deepest first."""

    def depth(index: int) -> int:
        levels, at = 0, parents[index]
        while at is not None:
            levels, at = levels + 1, parents[at]
        return levels

    pairs = [(index, parent) for index, parent in enumerate(parents) if parent is not None]
    return tuple(sorted(pairs, key=lambda pair: -depth(pair[0])))
