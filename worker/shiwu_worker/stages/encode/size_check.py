"""Checks vectors: that they are finite, and in a batch of known images that each row agrees with FP32 on the CPU.

Libraries choose another kernel for each batch size, and a CUDA graph is captured for each, so one size may be wrong
while the others are right.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shiwu_worker.errors import NonFiniteError

MIN_COSINE_TO_REFERENCE: Final = 0.98
"""Lowest cosine to FP32 on the CPU; narrower number formats differ from it slightly."""


class SizeCheck:
    """Known images in batches of any size, and what is wrong with their vectors.

    Args:
        images: uint8 (n, h, w, 3), which should differ, so that a row that got another row's vector is noticed.
        references: their unit vectors float32 (n, d), computed in FP32 on the CPU.
    """

    def __init__(self, images: NDArray[np.uint8], references: NDArray[np.float32]) -> None:
        self._images = images
        self._references = references

    def pixels(self, size: int) -> NDArray[np.uint8]:
        """A batch uint8 (size, h, w, 3) of the known images, which begins with another one for each size."""
        return self._images[self._numbers(size)]

    def wrong(self, vectors: NDArray[np.float32]) -> str | None:
        """What is wrong with the vectors of `pixels(len(vectors))`; None where each row agrees with its reference."""
        cosines = (vectors * self._references[self._numbers(len(vectors))]).sum(axis=1)
        # NaN fails this comparison.
        rows = np.flatnonzero(~(cosines >= MIN_COSINE_TO_REFERENCE))
        if not rows.size:
            return None
        return (
            f"expected a cosine of {MIN_COSINE_TO_REFERENCE} or more to FP32 on the CPU in every row, "
            f"got {cosines[rows].min():.4f} in {rows.size} of {len(vectors)}, the first is row {rows[0]}"
        )

    def _numbers(self, size: int) -> NDArray[np.intp]:
        return (np.arange(size) + size) % len(self._images)


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
