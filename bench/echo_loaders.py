"""Loaders that return every image immediately, behind the real pool: its frames, its shares and its thread.

What a job costs the worker beside the model includes two frames of JSON. `bench.standin --echo-loaders N` starts these
processes in place of real loaders, which would take the cores that the worker needs.
"""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection

from shiwu_worker.loaders.channel import FrameChannel
from shiwu_worker.loaders.protocol import LOAD_TASK, MAX_FRAME_BYTES, MAX_OPTIONS_BYTES, Loaded, LoadTask, Ready


class EchoProcess:
    """One such process, as the pool sees it."""

    has_server_ended = False

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; returns the exit status."""
        return self._process.wait(timeout_s)


class EchoStarter:
    """Starts these processes in place of `LoaderStarter`, whose methods it has."""

    def __init__(self, selector: selectors.BaseSelector, memory_fd: int) -> None:
        self.missing = 0

    def begin(self) -> None:
        """Do nothing: there is no fork server."""

    def start(self, count: int, *, delay_s: float = 0.0) -> None:
        """Let `advance` start so many more."""
        self.missing += count

    def advance(self) -> list[tuple[EchoProcess, Connection]]:
        """Start the missing ones."""
        started = []
        for _ in range(self.missing):
            own_end, loader_end = socket.socketpair()
            with loader_end:
                command = [sys.executable, "-m", "bench.echo_loaders", str(loader_end.fileno())]
                process = subprocess.Popen(command, pass_fds=[loader_end.fileno()])
            started.append((EchoProcess(process), Connection(own_end.detach())))
        self.missing = 0
        return started

    def close(self) -> None:
        """Do nothing: the pool ends the processes."""


def main() -> None:
    """Answer every task immediately, until the worker closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        for _ in range(3):
            connection.recv_bytes(MAX_OPTIONS_BYTES)
        frames = FrameChannel(connection.fileno(), max_bytes=MAX_FRAME_BYTES)
        frames.send([Ready()])
        while True:
            for frame in frames.receive():
                # Each in a call of its own, as the threads of a loader send them.
                frames.send([_loaded(LOAD_TASK.decode(frame))])
    except (EOFError, OSError):
        return


def _loaded(task: LoadTask) -> Loaded:
    now_s = time.monotonic()
    return Loaded(
        ticket=task.ticket,
        slot=task.slot,
        started_s=now_s,
        fetched_s=now_s,
        decoded_s=now_s,
        n_bytes=1,
        format="JPEG",
        width=1,
        height=1,
        sha256=f"{task.ticket:064x}",
    )


if __name__ == "__main__":
    main()
