"""The interval of a share that was counted."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

Z_95: Final = 1.959964
"""97.5 % quantile of the normal distribution: 95 % lie within plus and minus this."""


class Interval(NamedTuple):
    """A share that was counted, between the ends of its 95 % interval."""

    low: float
    share: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether one share may be the other."""
        return self.low <= other.high and other.low <= self.high


def wilson(count: int, of: int) -> Interval:
    """Wilson's score interval (Wilson 1927), which holds for small counts and shares near 0 too.

    Args:
        count: how many of them had the property, 0 to `of`.
        of: how many there were; at least 1.
    """
    if not 0 <= count <= of or of < 1:
        raise ValueError(f"expected a count of 0 to {of}, of at least 1, got {count} of {of}")
    share, square = count / of, Z_95**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = Z_95 / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of**2))
    return Interval(max(0.0, centre - half), share, min(1.0, centre + half))
