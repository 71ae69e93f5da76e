"""Errors that the readers of image formats raise, and a check that tells lack of memory from damaged data."""

from __future__ import annotations

import numpy as np

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected


def broken(text: str) -> Rejected:
    """An error for an image whose bytes are damaged or incomplete."""
    return Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE)


def too_large(text: str) -> Rejected:
    """An error for an image that is over a limit."""
    return Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


def unsupported(text: str) -> Rejected:
    """An error for an image whose format, or variant of a format, is not accepted."""
    return Rejected(ErrorCode.PICTURE_UNSUPPORTED, text, stage=Stage.DECODE)


def require_memory(n_bytes: int) -> None:
    """Allocate this many bytes and free them.

    Decoders report a failed allocation like damaged data, so after such an error this check tells which it was.

    Raises:
        MemoryError: when they cannot be allocated now.
    """
    np.empty(n_bytes, np.uint8)  # unlike bytearray it writes none of them, which takes longer than the allocation
