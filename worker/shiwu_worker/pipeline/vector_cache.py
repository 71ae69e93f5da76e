"""Keeps the vectors of the last images, by the SHA-256 of their files.

A ring with a second chance (CLOCK): each batch is written behind the batch before it, over the oldest vectors, but a
vector that was used since the last round stays for another one. Unlike in a list of the last used, all steps handle a
whole batch: thousands of images a second pass here, and most are never seen again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu.contract import ImageInfo

MAX_REFERENCE_CHARS: Final = 1024
"""A longer reference is not kept with a vector, so that producers cannot fill the memory with references."""


class VectorCache:
    """The vectors of up to `size` images. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = 0
        """The row that is written next; it has the oldest vector, once all rows are in use."""
        self.rows: dict[str, int] = {}
        """SHA-256 of each image in the cache → its row. For readers."""
        self._keys: list[str] = [""] * size
        self._images: list[ImageInfo | None] = [None] * size
        self._vectors: NDArray[np.float32] | None = None
        """Float32 (size, d), exactly as the model gave them. The system gives memory to a row when it is first used."""
        self._used = bytearray(size)
        """1 for each row that was used since the ring came by."""
        self._dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, sha256: str) -> tuple[NDArray[np.float32], ImageInfo | None]:
        """A copy of the vector (d) and the facts of an image that is in the cache."""
        if self._vectors is None:
            raise KeyError(sha256)
        row = self.rows[sha256]
        self._used[row] = 1
        return self._vectors[row].copy(), self._images[row]

    def put(self, keys: Sequence[str], images: Sequence[ImageInfo | None], vectors: NDArray[np.float32]) -> None:
        """Keep vectors (n, d) of images that are not in the cache, with their facts."""
        if self._vectors is None:
            self._vectors = np.empty((self._size, vectors.shape[1]), np.float32)
        while keys:
            begin = self._next
            end = min(self._size, begin + len(keys))
            used = self._used.find(1, begin, end)
            if used == begin:
                self._used[begin], self._next = 0, (begin + 1) % self._size
                continue
            end = used if used > begin else end
            count = end - begin
            self._drop(begin, end)
            self._keys[begin:end] = keys[:count]
            self._images[begin:end] = map(_without_long_reference, images[:count])
            self._vectors[begin:end] = vectors[:count]
            self.rows.update(zip(keys[:count], range(begin, end), strict=True))
            self._next = end % self._size
            keys, images, vectors = keys[count:], images[count:], vectors[count:]

    def _drop(self, begin: int, end: int) -> None:
        rows = self.rows
        dropped = [key for key in self._keys[begin:end] if key]
        for key in dropped:
            rows.pop(key, None)
        self._dropped += dropped

    def take_dropped(self) -> list[str]:
        """The images that left the cache since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def clear(self) -> None:
        """Drop everything."""
        self.rows.clear()
        self._keys = [""] * self._size
        self._images = [None] * self._size
        self._vectors = None


def _without_long_reference(image: ImageInfo | None) -> ImageInfo | None:
    if image is None or len(image.reference) <= MAX_REFERENCE_CHARS:
        return image
    return msgspec.structs.replace(image, reference="")
