"""Where log lines go: standard error, or a file that may be rotated. A line that cannot be written costs no job."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import BinaryIO, Final

POLL_EVERY_S: Final = 1.0


def open_standard_streams() -> None:
    """Open what the parent has closed of the descriptors 0, 1 and 2.

    A socket would otherwise get the number 2, and a library that writes to standard error would write into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115 for as long as the process lives


class LogOutput:
    """A binary stream for log lines. Thread-safe; never raises: a reader may have gone, a disk may be full.

    Args:
        path: a file to append to; it is opened anew where it was moved or deleted. None is standard error.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._looked_s = 0.0
        self._lost = 0

    def isatty(self) -> bool:
        """Whether people read the lines as they come."""
        return self._path is None and sys.stderr.isatty()

    def write(self, line: bytes | str) -> None:
        """Write a line; the next one that can be written tells how many could not."""
        data = line.encode(errors="backslashreplace") if isinstance(line, str) else line
        with self._lock:
            try:
                file = self._open() if self._path is not None else sys.stderr.buffer
                if self._lost:
                    file.write(b'{"event": "log_lines_lost", "level": "warning", "lines": %d}\n' % self._lost)
                file.write(data)
                file.flush()
            except (OSError, ValueError, AttributeError):
                self._lost += data.count(b"\n")
            else:
                self._lost = 0

    def flush(self) -> None:
        """Without effect: each line is written out."""

    def close(self) -> None:
        """Close the file; standard error stays open."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> BinaryIO:
        """The file, opened anew where another has its name."""
        now_s = time.monotonic()
        if self._file is not None and now_s - self._looked_s < POLL_EVERY_S:
            return self._file
        self._looked_s = now_s
        if self._file is None or not self._is_current(self._file):
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = open(str(self._path), "ab")  # noqa: SIM115 kept from line to line
        return self._file

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            named, held = os.stat(str(self._path)), os.fstat(file.fileno())
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
