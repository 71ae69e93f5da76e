"""What glibc's malloc does with the memory that a forward pass on a CPU frees. See `man mallopt`.

Left alone it gives large blocks back to the kernel, and gets them again page by page: 4,000 to 40,000 faults for each
pass of ViT-B/16. With another malloc nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_KEPT_BYTES: Final = 1 << 30
_MAPPED_BYTES: Final = 32 << 20
"""The most that mallopt takes; larger blocks are still mapped for each use."""


def use_one_arena() -> None:
    """Let all threads that are started from now on allocate from the main arena.

    The others are made of pieces of 64 MiB, each given back to the kernel as soon as nothing is left in it, whatever
    the thresholds are.
    """
    _mallopt((_ARENA_MAX, 1))


def keep_freed_memory() -> None:
    """Let the main arena keep what is freed, for the next pass, which needs the same."""
    _mallopt((_TRIM_THRESHOLD, _KEPT_BYTES), (_MMAP_THRESHOLD, _MAPPED_BYTES))


def _mallopt(*settings: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings:
            mallopt(name, value)
