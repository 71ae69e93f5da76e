"""One projection of a picture's features, and one unit vector for each word, so that cosines rank as logits do.

A word's logit is linear in the features: a.B(f - mean) + b. The word is t = [a; b/k; rest]/R, the picture
x = [B(f - mean); k; 0]/|x|, and their cosine is (a.B(f - mean) + b) / (R |x|). |x| is the same for all words of one
picture, so the order of the words is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from recipes.photo_zh.groups import PERSON, Group, learn_groups
from recipes.photo_zh.tables import UNKNOWN
from recipes.photo_zh.vision import FEATURES, TOP_CHANNELS, Floats

DIM: Final = 320
NOTHING, UNSURE = -1.0, 6.0
"""Logits, on every picture, of a word that the model does not know, and of the word 未知."""
SHARPEN: Final = 1.3
"""The classifier's own softmax is less sure than it is right."""
SHRINK: Final = 0.8
"""How much of the pool's covariance is replaced by the identity: the pool is small."""


@dataclass(frozen=True, slots=True)
class Space:
    """What both towers of the checkpoint are made from."""

    projection: Floats
    """(DIM, 1288): from the vision tower's output to the picture's vector."""
    vectors: dict[str, Floats]
    """The unit vector of each known word."""
    nothing: Floats
    """The unit vector of every unknown word."""
    logit_scale: float
    """As the checkpoint stores it: a logarithm."""


def make_space(
    words: Mapping[str, frozenset[int]], classifier: Floats, pool: Floats, is_person: NDArray[np.bool_]
) -> Space:
    """Make the vectors of all words.

    Args:
        words: each word with its classes.
        classifier: (1000, 1281), the bias last.
        pool: features (n, 1280) of photographs, for their mean and spread and as examples of people.
    """
    weights, mean = classifier[:, :-1], pool.mean(0)
    kinds = {members: word for word, members in words.items() if len(members) > 1}
    groups: list[Group] = [(PERSON if members == words[PERSON] else word, members) for members, word in kinds.items()]
    classes = np.c_[weights, classifier[:, -1] + weights @ mean]
    rows = np.concatenate([classes, learn_groups(groups, weights, pool, is_person)])
    place = {frozenset([index]): index for index in range(len(weights))}
    place |= {members: len(weights) + index for index, (_, members) in enumerate(groups)}

    basis, answers = _main_directions(rows[:, :-1], pool)
    size = float(np.linalg.norm((pool - mean) @ basis.T, axis=1).mean())
    k = 0.5 * size
    projection = np.zeros((DIM, TOP_CHANNELS))
    projection[: DIM - 2, :FEATURES] = basis
    projection[: DIM - 2, FEATURES] = -basis @ mean
    projection[DIM - 2, FEATURES] = k
    bare = np.c_[answers, rows[:, -1] / k]
    radius = 1.02 * float(np.linalg.norm(bare, axis=1).max())
    vectors = {word: _unit(bare[place[members]], radius) for word, members in words.items()}
    vectors |= dict.fromkeys(UNKNOWN, _unit(_constant(UNSURE / k), radius))
    scale = float(np.log(SHARPEN * radius * np.hypot(size, k)))
    return Space(projection, vectors, _unit(_constant(NOTHING / k), radius), scale)


def _main_directions(weights: Floats, pool: Floats) -> tuple[Floats, Floats]:
    """The directions that matter most for logits of pictures, and each row's part along them.

    A singular value decomposition, weighted by the features' covariance, most of which is shrunk to the identity.
    """
    spread = np.cov(pool.T)
    spread = (1 - SHRINK) * spread / np.trace(spread) * len(spread) + SHRINK * np.eye(len(spread))
    values, axes = np.linalg.eigh(spread)
    root, inverse = (axes * values**0.5) @ axes.T, (axes * values**-0.5) @ axes.T
    u, s, vt = np.linalg.svd(weights @ root, full_matrices=False)
    basis, answers = vt[: DIM - 2] @ inverse, u[:, : DIM - 2] * s[: DIM - 2]
    # The decomposition leaves the signs open; another BLAS would choose others.
    signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])
    return basis * signs[:, None], answers * signs


def _constant(value: float) -> Floats:
    """The bare vector of a word with the same logit on every picture."""
    vector: Floats = np.r_[np.zeros(DIM - 2), value]
    return vector


def _unit(vector: Floats, radius: float) -> Floats:
    """Fill the coordinate that no picture has, so that all words are equally long."""
    unit: Floats = np.r_[vector, np.sqrt(radius**2 - vector @ vector)] / radius
    return unit
