"""Times of batch sizes where all are measured before the first image, and how waiting images are cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

LONGEST_S: Final = 1.0
"""A pass that takes longer is run once only."""
ROUNDS: Final = 5
MEASURED_S: Final = 1.0
"""Rounds end when they have taken so long together."""


def measure(
    run: Callable[[int], float], rungs: Sequence[int], *, is_enough: Callable[[Mapping[int, float]], bool]
) -> dict[int, float]:
    """Seconds of one batch of each size, from the smallest up: the best of some runs.

    After the first run of each the sizes take turns: what slows the machine for a while slows all of them, and their
    ratios hold.

    Args:
        run: runs one batch of a size, and says how many seconds it took.
        is_enough: told what was measured so far, says that no larger size need be tried.
    """
    seconds: dict[int, float] = {}
    for rung in rungs:
        seconds[rung] = run(rung)
        if is_enough(seconds):
            break
    spent_s = 0.0
    for _ in range(ROUNDS):
        for rung in [rung for rung, took_s in seconds.items() if took_s < LONGEST_S]:
            took_s = run(rung)
            seconds[rung] = min(seconds[rung], took_s)
            spent_s += took_s
        if spent_s >= MEASURED_S:
            break
    return seconds


def next_batches(seconds: Mapping[int, float]) -> tuple[int, ...]:
    """How many of 0, 1, 2, … waiting pictures, up to the largest size, the next batch should take.

    All that wait should be done in the least time: in one batch, padded up to the next size, or in a smaller full one
    and others after it. Where a batch costs nearly the same at any size, as on a GPU, that is one batch. Where it costs
    by the picture, as on a CPU, five are quicker done as four and one than as eight of which three are padding.
    """
    sizes = sorted(seconds)
    first, least_s = [0], [0.0]
    for waiting in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= waiting)
        full = [size for size in reversed(sizes) if size <= waiting]
        ways = [(seconds[padded], waiting), *((seconds[size] + least_s[waiting - size], size) for size in full)]
        # Of equals the first: one batch, or the larger one.
        best_s, taken = min(ways, key=lambda way: way[0])
        first.append(taken)
        least_s.append(best_s)
    return tuple(first)
