"""Images that stand for all images that a label set will meet: their vectors, and where each of them is from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ASIDE: Final = 1 / 3
"""Share of the images that is kept aside, at least."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Unit vectors (n, d), float32, and the source of each: a folder, a bucket, a customer."""

    vectors: NDArray[np.float32]
    sources: Sequence[str]

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: the number of sources is not that of the vectors.
        """
        if self.vectors.ndim != 2 or len(self.sources) != len(self.vectors):
            expected = f"vectors (n, d) and a source for each, got {self.vectors.shape} and {len(self.sources)} sources"
            raise ValueError(f"expected {expected}")

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.vectors)

    def distinct(self) -> Pool:
        """The pool with one of each group of equal images: a picture that was posted often counts once."""
        first: dict[bytes, int] = {}
        for row, vector in enumerate(self.vectors):
            first.setdefault(vector.astype("<f2").tobytes(), row)
        return self._take(sorted(first.values()))

    def split(self, *, seed: int) -> tuple[Pool, Pool, bool]:
        """The pool in two parts, the second kept aside; and whether no source is in both.

        Images of one source resemble each other, so a source goes whole into one part. A pool of one source is divided
        by images, and its part aside then says less about other sources.
        """
        chance = np.random.default_rng(seed)
        names = sorted(set(self.sources))
        is_by_source = len(names) > 1
        groups: dict[str, list[int]] = {}
        for row, source in enumerate(self.sources):
            groups.setdefault(source if is_by_source else str(row), []).append(row)
        keys = sorted(groups, key=lambda key: hashlib.sha256(key.encode(errors="surrogatepass")).digest())
        aside: list[int] = []
        for index in chance.permutation(len(keys)):
            rows = groups[keys[index]]
            is_too_much = len(aside) + len(rows) > (1 - ASIDE) * len(self)
            if len(aside) < ASIDE * len(self) and not (is_too_much and is_by_source):
                aside += rows
        chosen = set(aside)
        return (
            self._take([row for row in range(len(self)) if row not in chosen]),
            self._take(sorted(aside)),
            is_by_source,
        )

    def _take(self, rows: Sequence[int]) -> Pool:
        return Pool(self.vectors[list(rows)], [self.sources[row] for row in rows])
