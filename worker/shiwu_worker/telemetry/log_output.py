"""Output of log lines: standard error, or a file that may be rotated. Failing writes never fail a job."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Final

POLL_EVERY_S: Final = 1.0


def open_standard_streams() -> None:
    """Open those of the descriptors 0, 1 and 2 that the parent process has closed.

    Otherwise a socket would get the number 2, and a library that writes to standard error would write into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115 open until the process exits


class LogOutput:
    """A binary stream for log lines. Thread-safe. Never raises, for example if a disk is full or a pipe is closed.

    Args:
        path: a file to append to; it is reopened after it was moved or deleted. None is standard error.
        clock: gives monotonic seconds.
    """

    def __init__(self, path: str | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._checked_s = 0.0
        self._lost = 0

    def isatty(self) -> bool:
        """Return whether the lines go to a terminal."""
        return self._path is None and sys.stderr.isatty()

    def write(self, line: bytes | str) -> None:
        """Write a line. After failed writes, the next one is preceded by a line with their number."""
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
        """Do nothing: `write` flushes each line."""

    def close(self) -> None:
        """Close the file; standard error stays open."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> BinaryIO:
        """Return the file, reopened if its path is missing or is another file now."""
        now_s = self._clock()
        if self._file is not None and now_s - self._checked_s < POLL_EVERY_S:
            return self._file
        self._checked_s = now_s
        if self._file is None or not self._is_current(self._file):
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = open(str(self._path), "ab")  # noqa: SIM115 stays open between lines
        return self._file

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            at_path, opened = os.stat(str(self._path)), os.fstat(file.fileno())
        except OSError:
            return False
        return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)
