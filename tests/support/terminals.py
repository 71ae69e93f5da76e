"""A process in a terminal of a given size, whose output is read and whose keys are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from typing import Self

from tests.support.processes import clean_environment
from tests.support.waiting import wait_until

LEAVE_FULL_SCREEN = b"\x1b[?1049l"


class Terminal:
    """Runs a command as long as the context is open.

    Args:
        env: variables besides those that every process gets.
    """

    def __init__(
        self, command: Sequence[str], *, columns: int = 80, rows: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._size = struct.pack("HHHH", rows, columns, 0, 0)
        self._env = clean_environment({"TERM": "xterm-256color", "COLORTERM": "truecolor", **(env or {})})
        self.output = bytearray()

    def __enter__(self) -> Self:
        """Start the process."""
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, self._size)
        os.set_blocking(self._leader, False)
        self._process = subprocess.Popen(
            self._command, stdin=follower, stdout=follower, stderr=follower, env=self._env, start_new_session=True
        )
        os.close(follower)
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process where it still runs."""
        self._process.kill()
        self._process.wait(10)
        os.close(self._leader)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def read(self) -> bytes:
        """All output until now."""
        try:
            while part := os.read(self._leader, 65_536):
                self.output += part
        except (BlockingIOError, OSError):  # nothing more now, or the process has ended
            pass
        return bytes(self.output)

    def wait_for(self, text: str, *, timeout_s: float = 30.0) -> None:
        """Wait until the output has this text.

        Raises:
            AssertionError: the process has ended without it; with the end of its output.
        """

        def is_shown() -> bool:
            has_ended = self._process.poll() is not None
            is_found = text.encode() in self.read()
            assert is_found or not has_ended, self.output[-2000:].decode(errors="replace")
            return is_found

        wait_until(is_shown, timeout_s=timeout_s, what=f"{text!r} on the terminal")

    def press(self, keys: str) -> None:
        """Send keys."""
        os.write(self._leader, keys.encode())

    def wait_end(self, *, timeout_s: float = 20.0) -> int:
        """Wait until the process has ended; its exit code."""
        wait_until(lambda: (self.read(), self._process.poll())[1] is not None, timeout_s=timeout_s, what="the end")
        return self._process.wait()
