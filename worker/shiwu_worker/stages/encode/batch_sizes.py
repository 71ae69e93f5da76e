"""Times of all batch sizes, measured before the first image, and how waiting images are cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

MAX_REPEATED_S: Final = 1.0
"""A pass that takes longer is run only once."""
MAX_ROUNDS: Final = 5
MAX_ROUNDS_S: Final = 1.0
"""No further round begins when the rounds together have taken this long."""


def time_batch_sizes(
    run: Callable[[int], float], batch_sizes: Sequence[int], *, is_enough: Callable[[Mapping[int, float]], bool]
) -> dict[int, float]:
    """Seconds of one batch of each size, from the smallest up: the best of several runs.

    After the first run of each the sizes take turns. What slows the machine for a while then slows all of them, so
    their ratios stay correct.

    Args:
        run: runs one batch of a size and returns the seconds it took.
        is_enough: gets the times measured so far; True ends the search for larger sizes.
    """
    seconds: dict[int, float] = {}
    for size in batch_sizes:
        seconds[size] = run(size)
        if is_enough(seconds):
            break
    spent_s = 0.0
    for _ in range(MAX_ROUNDS):
        for size in [size for size, pass_s in seconds.items() if pass_s < MAX_REPEATED_S]:
            pass_s = run(size)
            seconds[size] = min(seconds[size], pass_s)
            spent_s += pass_s
        if spent_s >= MAX_ROUNDS_S:
            break
    return seconds


def plan_batches(seconds: Mapping[int, float]) -> tuple[int, ...]:
    """How many of 0, 1, 2, … waiting images, up to the largest size, the next batch should take.

    The plan finishes all waiting images in the least time: in one batch, padded up to the next size, or in a smaller
    full batch and others after it. On a GPU a batch costs nearly the same at any size, so one batch is best. On a CPU
    it costs by the image: five are done faster as four and one than as eight of which three are padding.
    """
    sizes = sorted(seconds)
    plan, least_s = [0], [0.0]
    for waiting in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= waiting)
        full = [size for size in reversed(sizes) if size <= waiting]
        options = [(seconds[padded], waiting), *((seconds[size] + least_s[waiting - size], size) for size in full)]
        # Among equals min() takes the first: one batch, or the larger one.
        best_s, count = min(options, key=lambda option: option[0])
        plan.append(count)
        least_s.append(best_s)
    return tuple(plan)
