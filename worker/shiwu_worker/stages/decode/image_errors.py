"""What the readers of image formats raise, and how a lack of memory is told from damage."""

from __future__ import annotations

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected


def broken(text: str) -> Rejected:
    """The image's own bytes are damaged or incomplete."""
    return Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE)


def too_large(text: str) -> Rejected:
    """The image is over a limit."""
    return Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


def unsupported(text: str) -> Rejected:
    """The image is of a format, or of a variant of one, that is not accepted."""
    return Rejected(ErrorCode.PICTURE_UNSUPPORTED, text, stage=Stage.DECODE)


def require_memory(count: int) -> None:
    """Ask for so many bytes and give them back.

    Decoders tell of a failed allocation as they tell of damaged data, so after such an error this decides which it was.

    Raises:
        MemoryError: they cannot be had now.
    """
    bytearray(count)
