"""How near each label lies to images that do not show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIMMED: Final = 0.05
"""Share of the images that is left out at either end for each label: some of the highest may show the label."""
MIN_DEVIATION: Final = 1e-6


@dataclass(frozen=True, eq=False)
class Background:
    """Mean and standard deviation of the cosines of each label, each (m), float64."""

    means: NDArray[np.float64]
    deviations: NDArray[np.float64]

    def z_scores(self, cosines: NDArray[np.float32]) -> NDArray[np.float64]:
        """By how many deviations cosines (n, m) lie above the mean of their label."""
        z: NDArray[np.float64] = (cosines.astype(np.float64) - self.means) / self.deviations
        return z

    def cosines_at(self, z: float) -> NDArray[np.float64]:
        """The cosine of each label (m) at this z score, -1 to 1."""
        return np.clip(self.means + z * self.deviations, -1.0, 1.0)


def fit_background(cosines: NDArray[np.float32]) -> Background:
    """Mean and deviation of each column of cosines (n, m), without the TRIMMED lowest and highest of the column.

    Raises:
        ValueError: there are no images, or a cosine is not a number.
    """
    if cosines.ndim != 2 or not len(cosines):
        raise ValueError(f"expected cosines of at least one image, got an array of shape {cosines.shape}")
    if not np.isfinite(cosines).all():
        raise ValueError("expected cosines that are numbers, got NaN or an infinity")
    ordered = np.sort(cosines.astype(np.float64), axis=0)
    cut = int(TRIMMED * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    return Background(kept.mean(axis=0), np.maximum(kept.std(axis=0), MIN_DEVIATION))
