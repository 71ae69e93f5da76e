"""Vectors as answers keep them: rounded to float16, and compared with labels in a way that can be repeated exactly."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LABELS_AT_ONCE: Final = 1024
"""Labels that are converted to float64 at a time, which bounds the memory: 4 MB for vectors of 512 numbers."""


def rounded(vectors: NDArray[np.float32]) -> NDArray[np.float16]:
    """Unit vectors as float16, little-endian. A number changes by 0.05 % at most, a cosine by about 0.00001."""
    return vectors.astype("<f2")


def to_base64(vector: NDArray[np.float16]) -> str:
    """The field `vector` of an answer: 4 characters for each 3 bytes, two bytes for each number."""
    return base64.b64encode(vector.tobytes()).decode("ascii")


def kept_cosines(vectors: NDArray[np.float16], labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines (n, m) of rounded vectors (n, d) and label vectors (m, d).

    The sums are made in float64 and then rounded, so a cosine depends neither on the other rows nor on the order in
    which a library or a machine adds numbers up. In float32 that order changes the last digits of an answer.
    """
    wide = vectors.astype(np.float64)
    cosines = np.empty((len(vectors), len(labels)), np.float32)
    for start in range(0, len(labels), LABELS_AT_ONCE):
        part = labels[start : start + LABELS_AT_ONCE]
        cosines[:, start : start + len(part)] = wide @ part.T.astype(np.float64)
    return cosines
