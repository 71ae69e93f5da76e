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
from collections import deque
from typing import Final

from shiwu_worker.runtime.process import plain_environment

STATUS_TIMEOUT_S: Final = 1.0
"""Longest wait for the exit status of a process that has ended, and for a request to be sent."""
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

    @property
    def has_server_ended(self) -> bool:
        """Whether the fork server has ended, with which this process ends. Known after `wait`."""
        return self._fork_server.has_ended

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
    """One fork server process. After `begin`, one thread uses it. No call waits for a fork."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._statuses: dict[int, int] = {}
        self._forked: deque[ForkedProcess] = deque()
        """Processes that `receive` has not returned yet."""
        self._running: set[int] = set()
        self.has_forked = False
        self.has_ended = False
        """Known once a method was called after the end."""
        self.is_given_up = False
        """Whether it hangs: nothing is expected of it any more."""

    def begin(self) -> None:
        """Start the process without waiting for it. It ends with the thread that calls this."""
        channel, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(STATUS_TIMEOUT_S)
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

    @property
    def channel(self) -> socket.socket:
        """Becomes readable when `receive` has something to do.

        Raises:
            ForkServerError: it was not begun, or is closed.
        """
        if self._socket is None:
            raise ForkServerError("expected a running fork server")
        return self._socket

    def count_children(self) -> int:
        """How many of the processes that it forked have not been waited for."""
        return len(self._running)

    def request(self, *fds: int) -> None:
        """Ask for a process that runs `process.serve` with these file descriptors; `receive` returns it.

        Raises:
            ForkServerError: it has ended.
        """
        try:
            socket.send_fds(self.channel, [FORK_REQUEST], list(fds))
        except OSError as error:
            raise ForkServerError(f"expected a fork server that takes requests ({type(error).__name__})") from error

    def receive(self) -> ForkedProcess | None:
        """The process that was asked for, once it is there; None until then. Does not wait.

        Raises:
            ForkServerError: it has ended.
        """
        while not self._forked and _is_readable(self.channel.fileno(), 0):
            self._read_frame()
        return self._forked.popleft() if self._forked else None

    def _read_frame(self) -> None:
        try:
            frame, pidfds, _, _ = socket.recv_fds(self.channel, 64, 1)
        except OSError as error:
            raise ForkServerError(f"expected a frame of the fork server ({type(error).__name__})") from error
        if not frame:
            self.has_ended = True
            raise ForkServerError("expected a forked process, but the fork server has ended")
        if pidfds:
            process = ForkedProcess(int(frame), pidfds[0], self)
            self.has_forked = True
            self._running.add(process.pid)
            self._forked.append(process)
        else:
            pid, _, status = frame.partition(b" ")
            self._statuses[int(pid)] = int(status)

    def status_of(self, pid: int) -> int:
        """The exit status of a forked process that has ended; -9 if the fork server does not tell it in time."""
        self._running.discard(pid)
        until_s = time.monotonic() + (0.0 if self.is_given_up else STATUS_TIMEOUT_S)
        with contextlib.suppress(ForkServerError):
            while pid not in self._statuses and (left_s := until_s - time.monotonic()) > 0:
                if _is_readable(self.channel.fileno(), left_s):
                    self._read_frame()
        return self._statuses.pop(pid, -signal.SIGKILL)

    def close(self) -> None:
        """End the fork server; the processes it forked end with it."""
        self.has_ended = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(5.0)
            self._process = None
        self._statuses.clear()


def _is_readable(fd: int, timeout_s: float) -> bool:
    # poll and not select: a worker may have more than 1024 files open.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))
