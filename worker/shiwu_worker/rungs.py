"""Which batch sizes a device should run, from how long each was seen to take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

GAIN: Final = 1.05
"""A larger batch must bring this much more pictures a second, or it only makes the others wait. Less may be chance."""


def worthwhile(seconds: Mapping[int, float]) -> int:
    """The smallest size nearly as good as the best. All are looked at, so that a disturbed one ends no search.

    Args:
        seconds: size → seconds of one batch.
    """
    rates = {rung: rung / took_s for rung, took_s in seconds.items()}
    return min(rung for rung, rate in rates.items() if rate * GAIN >= max(rates.values()))


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
