"""Linear classifiers for words that mean many classes (动物, 水果) and for 人物, of which ImageNet has no class.

The mean of its members' weights is a bad classifier of a group. These are learned, one against the rest, on features
made from the classes' weights and noise, because no photographs with labels come as packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.photo_zh.vision import Floats

RIGHT, WRONG = 8.0, 1.0
"""Logits of a group's word, on average, for its members and for other classes."""
PERSON: Final = "人物"
CLOTHES: Final = 0.3
"""How much made features of clothes count as features of a person."""
PERSON_BRAKE: Final = 1.5
"""Times the decay: a few real photographs would give this word a far longer vector than all others."""
LEAST_SHARE: Final = 0.002
"""A group of few classes counts as one of many up to this share of the examples."""
MADE_PER_CLASS: Final = 6
COPIES_OF_POOL: Final = 12
STEPS: Final = 300
BATCH: Final = 2048
RATE: Final = 0.02
DECAY: Final = 0.05

Group = tuple[str, frozenset[int]]


@dataclass(frozen=True, slots=True)
class Examples:
    """Features about their mean, and for each group whether they belong to it and how much they count."""

    features: torch.Tensor
    is_right: torch.Tensor
    weight: torch.Tensor
    person: int
    """The column of PERSON."""


def learn_groups(groups: list[Group], weights: Floats, pool: Floats, is_person: NDArray[np.bool_]) -> Floats:
    """Learn one linear classifier for each group.

    Args:
        weights: of the classes, (1000, 1280).
        pool: features of real photographs, (n, 1280); examples of PERSON, for or against, and of nothing else.

    Returns:
        Weights and, last, the bias, (groups, 1281), for features about the pool's mean.
    """
    torch.manual_seed(0)
    examples = _examples(groups, weights, pool, is_person)
    x, y, weight = examples.features, examples.is_right, examples.weight
    vectors = torch.zeros(x.shape[1], len(groups), requires_grad=True)
    bias = torch.zeros(len(groups), requires_grad=True)
    brake = torch.ones(len(groups))
    brake[examples.person] = PERSON_BRAKE
    optimizer = torch.optim.Adam([vectors, bias], lr=RATE)
    for step in range(STEPS):
        some = torch.randperm(len(x))[:BATCH]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x[some] @ vectors + bias, y[some], weight[some])
        optimizer.zero_grad()
        (loss + DECAY * (brake * (vectors**2).sum(0)).mean()).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
    with torch.no_grad():
        return _calibrated(examples, vectors, bias)


def _examples(groups: list[Group], weights: Floats, pool: Floats, is_person: NDArray[np.bool_]) -> Examples:
    rng = np.random.default_rng(0)
    made, kind = _simulate(weights, pool, rng)
    right = np.stack([np.isin(kind, sorted(members)) for _, members in groups], 1).astype(np.float64)
    counts = np.ones_like(right)
    person = [name for name, _ in groups].index(PERSON)
    counts[right[:, person] > 0, person] = CLOTHES
    copies = COPIES_OF_POOL * len(pool)
    real = np.tile(pool, (COPIES_OF_POOL, 1)) + rng.normal(size=(copies, pool.shape[1])) * 0.3 * pool.std(0)
    nothing = np.zeros((copies, len(groups)))
    right, counts = np.concatenate([right, nothing]), np.concatenate([counts, nothing])
    right[len(made) :, person] = np.tile(is_person, COPIES_OF_POOL)
    counts[len(made) :, person] = 1
    share = (right * counts).sum(0) / counts.sum(0)
    counts *= np.where(right > 0, 1 / np.maximum(share, LEAST_SHARE), 1 / (1 - share))
    x = torch.from_numpy(np.concatenate([made, real]) - pool.mean(0)).float()
    return Examples(x, torch.from_numpy(right).float(), torch.from_numpy(counts / counts.mean(0)).float(), person)


def _simulate(weights: Floats, pool: Floats, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Features as photographs of each class may have them: along its weights, a second class faintly, and noise."""
    along = weights / (weights**2).sum(1, keepdims=True)
    kind = np.tile(np.arange(len(weights)), MADE_PER_CLASS)
    n = len(kind)
    first, second = rng.uniform(5, 10, (n, 1)), rng.permutation(kind)
    made = pool.mean(0) + along[kind] * first + along[second] * rng.uniform(0, 3, (n, 1))
    return made + rng.normal(size=made.shape) * rng.uniform(0.3, 1.0, (n, 1)) * pool.std(0), kind


def _calibrated(examples: Examples, vectors: torch.Tensor, bias: torch.Tensor) -> Floats:
    """Scale and shift all groups alike, so that their logits compare as they were learned."""
    logits = examples.features @ vectors + bias
    counts = examples.weight > 0
    on = (examples.is_right > 0) & counts
    off = ~on & counts
    high, low = (logits * on).sum(0) / on.sum(0), (logits * off).sum(0) / off.sum(0)
    gain = (RIGHT - WRONG) / (high - low).mean()
    result: Floats = torch.cat([vectors * gain, ((bias - high.mean()) * gain + RIGHT)[None]]).T.double().numpy()
    return result
