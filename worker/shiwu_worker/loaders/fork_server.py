"""Starts loaders in milliseconds: a fork server, which has imported everything they need, forks them.

Imports would take a loader half a second of CPU. With a fork, an image that ends its loader hardly delays the others.
The fork server (`fork_server_main`) is started by exec, has one thread and never reads an image.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Final

from shiwu_worker.runtime.process import _PLAIN_NAMES

FORK_TIMEOUT_S: Final = 60.0
"""Longest wait for a fork; the first one waits for the imports. A fork server that needs longer is replaced."""
STATUS_TIMEOUT_S: Final = 1.0
FORK_REQUEST: Final = b"?"


class ForkServerError(RuntimeError):
    """The fork server has ended or hangs."""


class ForkedProcess:
    """One forked process, as the worker sees it. Its pidfd always means this process; a pid may be reused."""

    def __init__(self, pid: int, pidfd: int, fork_server: ForkServer) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._fork_server = fork_server
        self._status: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._status is not None or _is_readable(self._pidfd, 0)

    def kill(self) -> None:
        """Send SIGKILL; has no effect if the process has ended."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; returns the exit status, negative for a signal, and -9 if the fork server ended, too.

        Raises:
            TimeoutError: when the process still runs.
        """
        if self._status is None:
            if not _is_readable(self._pidfd, timeout_s):
                raise TimeoutError(f"expected process {self.pid} to end within {timeout_s:g} s")
            os.close(self._pidfd)
            self._status = self._fork_server.status_of(self.pid)
        return self._status


class ForkServer:
    """Starts the fork server's process, and restarts it if it has ended. After `begin`, one thread uses it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._statuses: dict[int, int] = {}

    def begin(self) -> None:
        """Start the process without waiting for it. It ends with the thread that calls this."""
        self._start()

    def fork(self, *fds: int) -> ForkedProcess:
        """Fork a process that runs `process.serve` with these file descriptors.

        Raises:
            ForkServerError: when a second try fails, too.
        """
        try:
            return self._fork(fds)
        except ForkServerError:
            self.close()
            return self._fork(fds)

    def _fork(self, fds: tuple[int, ...]) -> ForkedProcess:
        channel = self._socket
        if channel is None or self._process is None or self._process.poll() is not None:
            channel = self._start()
        try:
            socket.send_fds(channel, [FORK_REQUEST], list(fds))
            while True:
                frame, pidfds, _, _ = socket.recv_fds(channel, 64, 1)
                if not frame:
                    raise ForkServerError("expected a forked process, but the fork server has ended")
                if pidfds:
                    return ForkedProcess(int(frame), pidfds[0], self)
                self._store_status(frame)
        except OSError as error:
            raise ForkServerError(f"expected a forked process ({type(error).__name__})") from error

    def _start(self) -> socket.socket:
        self.close()
        channel, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(FORK_TIMEOUT_S)
        with server_end:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "shiwu_worker.loaders.fork_server_main",
                    str(server_end.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=(server_end.fileno(),),
                stdin=subprocess.DEVNULL,
                env=plain_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # the worker handles Ctrl-C
            )
        self._socket = channel
        return channel

    def status_of(self, pid: int) -> int:
        """The exit status of a forked process that has ended."""
        until_s = time.monotonic() + STATUS_TIMEOUT_S
        while pid not in self._statuses and self._socket is not None and (left_s := until_s - time.monotonic()) > 0:
            if not _is_readable(self._socket.fileno(), left_s):
                break
            try:
                frame = self._socket.recv(64)
            except OSError:
                break
            if not frame:
                break
            self._store_status(frame)
        return self._statuses.pop(pid, -signal.SIGKILL)

    def _store_status(self, frame: bytes) -> None:
        pid, _, status = frame.partition(b" ")
        self._statuses[int(pid)] = int(status)

    def close(self) -> None:
        """End the fork server; the processes it forked end with it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(5.0)
            self._process = None
        self._statuses.clear()


def plain_environment() -> dict[str, str]:
    """The variables that a Python process needs to start and find its files; none of them is a secret."""
    return {name: value for name, value in os.environ.items() if _PLAIN_NAMES.fullmatch(name)}


def _is_readable(fd: int, timeout_s: float) -> bool:
    # poll and not select: a worker may have more than 1024 files open.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))
