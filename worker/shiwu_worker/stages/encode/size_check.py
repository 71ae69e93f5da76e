"""Checks vectors: that they are finite, and in a batch of known images that each row agrees with FP32 on the CPU.

Libraries choose another kernel for each batch size, and a CUDA graph is captured for each, so one size may be wrong
while the others are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shiwu_worker.errors import NonFiniteError

MIN_COSINE_TO_REFERENCE: Final = 0.98
"""Lowest cosine to FP32 on the CPU; narrower number formats differ from it slightly."""
RANDOM_IMAGES: Final = 3


class SizeCheck:
    """Known images in batches of any size, and what is wrong with their vectors.

    Args:
        images: uint8 (n, h, w, 3), which should differ, so that a row that got another row's vector is noticed. Without
            them the images are random.
        references: their unit vectors float32 (n, d), computed in FP32 on the CPU; None if there are none.
        shape: of one image, (h, w, 3).
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | None,
        references: NDArray[np.float32] | None,
        *,
        shape: tuple[int, int, int],
    ) -> None:
        # Not of one colour: a GPU runs products of equal numbers faster.
        noise = np.random.default_rng(0).integers(0, 256, (RANDOM_IMAGES, *shape), np.uint8)
        self.images = noise if images is None else images
        """The images of which all batches are made."""
        self._references = references

    def rows(self, size: int, number: int = 0) -> list[int]:
        """Which images are in a batch: it begins with another one for each size and number."""
        return [(row + size + number) % len(self.images) for row in range(size)]

    def wrong(self, batches: Sequence[NDArray[np.float32]]) -> str | None:
        """What is wrong with vectors of batches with the numbers 0, 1, 2, …; None if each agrees with its reference.

        Consecutive batches have other images in the same row, so vectors of another batch are noticed.

        Raises:
            NonFiniteError: there are no references, and a vector is not finite.
        """
        reasons = [self._wrong(vectors, number) for number, vectors in enumerate(batches)]
        return next(filter(None, reasons), None)

    def _wrong(self, vectors: NDArray[np.float32], number: int) -> str | None:
        if self._references is None:
            finite(vectors)
            return None
        cosines = (vectors * self._references[self.rows(len(vectors), number)]).sum(axis=1)
        # NaN fails this comparison.
        rows = np.flatnonzero(~(cosines >= MIN_COSINE_TO_REFERENCE))
        if not rows.size:
            return None
        return (
            f"expected a cosine of {MIN_COSINE_TO_REFERENCE} or more to FP32 on the CPU in every row, "
            f"got {cosines[rows].min():.4f} in {rows.size} of {len(vectors)}, the first is row {rows[0]}"
        )


def finite(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same vectors (n, d).

    Raises:
        NonFiniteError: names the rows that are not finite.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        rows = tuple(bad.tolist())
        raise NonFiniteError(f"expected finite vectors, got NaN or infinity in rows {list(rows)[:20]}", rows)
    return vectors
