"""The memory that a worker shares with its loaders: the pixels of each slot, and the digests of images it knows.

The digests are hints. Loaders note an image that they have decoded and find those of other loaders, without a frame to
the worker and back. A wrong hint costs a second fetch: the worker has its own books of what it knows.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.loaders.protocol import LoaderOptions

ENTRY_BYTES: Final = 8
ENTRIES_PER_IMAGE: Final = 4
"""Entries for each image that a worker may know, so that few digests share an entry. The number is rounded up."""
TURN_TIMEOUT_S: Final = 1.0
"""Longest wait for another thread that decodes the same file. An image that is decoded more slowly is hostile or rare,
and waiting for it once for each thread would exceed the time limit of fetch and decode."""


class KnownImages:
    """A table of digests in shared memory. Each digest has one entry, which it shares with others: the last one stays.

    Thread-safe and process-safe: an entry is one aligned word, which is read and written whole.

    Args:
        entries: unsigned words of 64 bits; their number is 0 or a power of two. With 0 no image is known.
    """

    def __init__(self, entries: NDArray[np.uint64]) -> None:
        self._table = entries
        self._entries = memoryview(entries)  # type: ignore[arg-type]  # numpy's arrays are buffers
        self._mask = len(entries) - 1

    def __contains__(self, sha256: str) -> bool:
        return self._mask >= 0 and self._entries[int(sha256[:16], 16) & self._mask] == _word(sha256)

    def note(self, sha256: str) -> None:
        """Let loaders find this image."""
        if self._mask >= 0:
            self._entries[int(sha256[:16], 16) & self._mask] = _word(sha256)

    def forget(self, sha256s: Sequence[str]) -> None:
        """Let loaders decode these images again."""
        if self._mask >= 0:
            # All together: a worker forgets as many images as it encodes, once its cache is full.
            parts = np.frombuffer(bytes.fromhex("".join(sha256s)), ">u8").reshape(len(sha256s), 4)
            places, words = (parts[:, 0] & np.uint64(self._mask)).astype(np.intp), parts[:, 1] | np.uint64(1)
            self._table[places[self._table[places] == words]] = 0


def _word(sha256: str) -> int:
    """What stands in the entry: another part of the digest than the place, and never 0."""
    return int(sha256[16:32], 16) | 1


def entry_count(images: int) -> int:
    """The size of the table for a worker that knows so many images at a time: a power of two, or 0 for 0."""
    return 1 << (ENTRIES_PER_IMAGE * images - 1).bit_length() if images else 0


def memory_bytes(options: LoaderOptions) -> int:
    """Size of the shared memory."""
    return _table_offset(options) + entry_count(options.known_images) * ENTRY_BYTES


def map_memory(memory_fd: int, options: LoaderOptions) -> tuple[NDArray[np.uint8], KnownImages]:
    """Pixels uint8 (slots, h, w, 3) and the table, in a file of `memory_bytes`."""
    shape = (options.slots, options.spec.height, options.spec.width, 3)
    memory = mmap.mmap(memory_fd, memory_bytes(options))
    pixels = np.frombuffer(memory, np.uint8, count=math.prod(shape)).reshape(shape)
    count = entry_count(options.known_images)
    entries = np.frombuffer(memory, np.uint64, count=count, offset=_table_offset(options)) if count else _NO_ENTRIES
    return pixels, KnownImages(entries)


def create_memory(options: LoaderOptions) -> int:
    """A file of this size that has no name; returns its descriptor, which exec closes."""
    memory_fd = os.memfd_create("shiwu-pixels", os.MFD_CLOEXEC)
    os.ftruncate(memory_fd, memory_bytes(options))
    return memory_fd


def _table_offset(options: LoaderOptions) -> int:
    pixel_bytes = options.slots * options.spec.height * options.spec.width * 3
    return -(-pixel_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


_NO_ENTRIES: Final = np.zeros(0, np.uint64)


class DecodeTurns:
    """Lets the threads of one loader decode files with the same bytes one after the other. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[str, threading.Event] = {}

    @contextmanager
    def turn(self, sha256: str) -> Iterator[None]:
        """Wait until no other thread has the turn of this digest, for `TURN_TIMEOUT_S` at most."""
        with self._lock:
            end = self._ends.get(sha256)
            own = None if end is not None else self._ends.setdefault(sha256, threading.Event())
        if end is not None:
            # Afterwards all that waited go on together: where the first has failed, each decodes for itself.
            end.wait(TURN_TIMEOUT_S)
        try:
            yield
        finally:
            if own is not None:
                with self._lock:
                    del self._ends[sha256]
                own.set()
