"""Finds the first columns of each row in the order of their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_COLUMNS: Final = 128
MIN_KEYS: Final = 4096
"""A partition of fewer labels or keys takes longer than to sort them."""


def smallest(keys: NDArray[np.floating[Any]], count: int) -> NDArray[np.intp]:
    """The columns of the smallest keys of each row, (n, count) or fewer: ascending, equal keys in the order of columns.

    Where only keys of infinity are left, it may be any of them.
    """
    columns = keys.shape[1]
    if not 0 < count <= columns // 4 or columns < MIN_COLUMNS or keys.size < MIN_KEYS:
        return np.argsort(keys, axis=1, kind="stable")[:, :count]
    best = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)
    found = np.take_along_axis(keys, best, axis=1)
    best = np.take_along_axis(best, np.argsort(found, axis=1, kind="stable"), axis=1)
    # A partition takes any of several equal keys, so rows whose last key has equals outside are sorted as a whole.
    last = found.max(axis=1, keepdims=True)
    tied = ((keys <= last).sum(axis=1) > count) & np.isfinite(last[:, 0])
    if tied.any():
        best[tied] = np.argsort(keys[tied], axis=1, kind="stable")[:, :count]
    return best
