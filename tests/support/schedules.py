"""Random schedules of batches: launched ahead, waited for and collected in any order, equal to a serial run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_UNDER_WAY: Final = 3
SOME: Final = 12
"""Different batches of which schedules are made; none is ever changed, so equal bits are expected of each."""


@dataclass(frozen=True)
class Batches:
    """Batches and the vectors that each got when it ran alone."""

    pixels: NDArray[np.uint8]
    rows: tuple[tuple[int, ...], ...]
    vectors: tuple[NDArray[np.float32], ...]


def serial(encoder: Any, pixels: NDArray[np.uint8], *, seed: int) -> Batches:
    """Draw batches of all sizes, and run each alone."""
    draw = random.Random(seed)
    most = encoder.batch_sizes[-1]
    counts = [*encoder.batch_sizes, *(draw.randint(1, most) for _ in range(SOME))]
    rows = tuple(tuple(draw.randrange(len(pixels)) for _ in range(count)) for count in counts)
    return Batches(pixels, rows, tuple(encoder.collect(encoder.launch(pixels, each)) for each in rows))


def play(
    encoder: Any, batches: Batches, *, steps: int, draw: random.Random, most_under_way: int = MAX_UNDER_WAY
) -> int:
    """Play one schedule and return the number of its batches.

    Raises:
        AssertionError: a batch got other bits than alone.
    """
    under_way: list[tuple[int, Any]] = []
    launched = 0
    for _ in range(steps):
        kind = draw.choice(("launch", "launch", "wait", "collect"))
        if kind == "launch" and len(under_way) < most_under_way:
            number = draw.randrange(len(batches.rows))
            pixels = batches.pixels.copy()
            under_way.append((number, encoder.launch(pixels, batches.rows[number])))
            pixels[:] = 0  # loaders may write to the slots as soon as the batch is launched
            launched += 1
        elif kind == "wait" and under_way:
            draw.choice(under_way)[1].wait()
        elif kind == "collect" and under_way:
            _check(encoder, batches, under_way.pop(draw.randrange(len(under_way))))
    for each in under_way:
        _check(encoder, batches, each)
    return launched


def _check(encoder: Any, batches: Batches, launched: tuple[int, Any]) -> None:
    number, batch = launched
    vectors, expected = encoder.collect(batch), batches.vectors[number]
    differing = _differing(vectors, expected)
    assert not differing, (
        f"batch {number} of {len(expected)}: expected the bits of a serial run, rows {differing} differ"
    )


def _differing(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> Sequence[int]:
    rows: list[int] = np.flatnonzero((vectors != expected).any(axis=1)).tolist()
    return rows[:10]
