"""Children that are born in milliseconds: forked by a process that has imported everything they need.

Importing takes a loader half a second of CPU; with a fork a picture that ends its loader costs its neighbours next to
nothing. The forking process (`nursery_process`) is started by exec, has one thread and never touches a picture.
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
"""Longest wait for a fork, the first one waits for the imports; a nursery that needs more is replaced."""
STATUS_S: Final = 1.0
ASK: Final = b"?"


class ForkServerError(RuntimeError):
    """The nursery is gone or hangs."""


class ForkedProcess:
    """One forked process, seen from the worker. The pidfd stays the same process' for ever, unlike a pid."""

    def __init__(self, pid: int, pidfd: int, fork_server: ForkServer) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._fork_server = fork_server
        self._status: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._status is not None or _is_readable(self._pidfd, 0)

    def kill(self) -> None:
        """SIGKILL; nothing happens where it is gone."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; the exit status, negative for a signal. -9 where the nursery ended with it.

        Raises:
            TimeoutError: it still runs.
        """
        if self._status is None:
            if not _is_readable(self._pidfd, timeout_s):
                raise TimeoutError(f"expected process {self.pid} to end within {timeout_s:g} s")
            os.close(self._pidfd)
            self._status = self._fork_server.status_of(self.pid)
        return self._status


class ForkServer:
    """Starts the nursery's process, and again when it has died. After `begin`, one thread uses it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._statuses: dict[int, int] = {}

    def begin(self) -> None:
        """Start the process and wait for nothing. It ends with the thread that calls this."""
        self._start()

    def fork(self, *fds: int) -> ForkedProcess:
        """A new process that runs `loader.serve` with these file descriptors.

        Raises:
            ForkServerError: after a second try.
        """
        try:
            return self._fork(fds)
        except ForkServerError:
            self.close()
            return self._fork(fds)

    def _fork(self, fds: tuple[int, ...]) -> ForkedProcess:
        ours = self._socket
        if ours is None or self._process is None or self._process.poll() is not None:
            ours = self._start()
        try:
            socket.send_fds(ours, [ASK], list(fds))
            while True:
                frame, pidfds, _, _ = socket.recv_fds(ours, 64, 1)
                if not frame:
                    raise ForkServerError("expected a child, the nursery has ended")
                if pidfds:
                    return ForkedProcess(int(frame), pidfds[0], self)
                self._note(frame)
        except OSError as error:
            raise ForkServerError(f"expected a child ({type(error).__name__})") from error

    def _start(self) -> socket.socket:
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(FORK_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shiwu_worker.loaders.fork_server_main", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=plain_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the worker's to handle
            )
        self._socket = ours
        return ours

    def status_of(self, pid: int) -> int:
        """The exit status of a child that has ended."""
        until_s = time.monotonic() + STATUS_S
        while pid not in self._statuses and self._socket is not None and (left_s := until_s - time.monotonic()) > 0:
            if not _is_readable(self._socket.fileno(), left_s):
                break
            try:
                frame = self._socket.recv(64)
            except OSError:
                break
            if not frame:
                break
            self._note(frame)
        return self._statuses.pop(pid, -signal.SIGKILL)

    def _note(self, frame: bytes) -> None:
        pid, _, status = frame.partition(b" ")
        self._statuses[int(pid)] = int(status)

    def close(self) -> None:
        """End the nursery; its children end with it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(5.0)
            self._process = None
        self._statuses.clear()


def plain_environment() -> dict[str, str]:
    """The variables without which a Python process does not start or find its files; none of them is a secret."""
    return {name: value for name, value in os.environ.items() if _PLAIN_NAMES.fullmatch(name)}


def _is_readable(fd: int, timeout_s: float) -> bool:
    # poll and not select: a worker may have more than 1024 files open.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))
