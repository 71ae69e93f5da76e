"""Frames between the worker and one loader, one on a line. One system call moves all that are there.

JSON has no line break outside of strings and an escaped one in them, so a line is a frame.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import msgspec

from shiwu_worker.loaders.protocol import ENCODER, ProtocolError

READ_BYTES: Final = 1 << 16
"""Most that one call reads."""


class FrameChannel:
    """One end of a stream of frames. One thread at a time may send, and one receive.

    Args:
        fd: the stream, which the caller opens and closes.
        max_bytes: the longest frame that is received.
    """

    def __init__(self, fd: int, *, max_bytes: int) -> None:
        self._fd = fd
        self._max_bytes = max_bytes
        self._begun = bytearray()
        """The part of a frame whose end has not come."""

    def receive(self) -> list[bytes]:
        """Wait until something comes, and return the frames whose ends have come: none, if it is a part of one.

        Raises:
            EOFError: the other end is closed.
            OSError: it was reset, or the time limit of the stream is over.
            ProtocolError: a frame is longer than allowed. It is lost, and those that came with it.
        """
        data = os.read(self._fd, READ_BYTES)
        if not data:
            raise EOFError
        *frames, begun = data.split(b"\n")
        if frames and self._begun:
            frames[0] = bytes(self._begun) + frames[0]
            self._begun.clear()
        self._begun += begun
        if max(map(len, (self._begun, *frames))) > self._max_bytes:
            raise ProtocolError(f"expected frames of at most {self._max_bytes} bytes")
        return frames

    def send(self, frames: Sequence[msgspec.Struct]) -> None:
        """Send these frames.

        Raises:
            OSError: the other end is closed, or did not take them within the time limit of the stream.
        """
        data = memoryview(ENCODER.encode_lines(frames))
        while data:
            data = data[os.write(self._fd, data) :]
