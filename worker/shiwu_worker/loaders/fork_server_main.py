"""The process that forks loaders: `fork_server` starts it by `python -m` with a file descriptor and its own pid.

It answers each request, which brings file descriptors along, with a child's pid and pidfd, and tells of each end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys

from shiwu_worker.loaders.process import serve
from shiwu_worker.loaders.seccomp import no_new_privileges
from shiwu_worker.runtime.process import die_with_parent
from shiwu_worker.stages.decode.decoder import warm


def _main() -> None:
    """Fork on demand and tell of ends, until the worker is gone."""
    die_with_parent(int(sys.argv[2]))
    no_new_privileges()
    warm()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What is alive now stays shared with every child.
    gc.freeze()
    wake_r, wake_w = socket.socketpair()
    wake_w.setblocking(False)
    wake_r.setblocking(False)
    signal.set_wakeup_fd(wake_w.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = socket.socket(fileno=int(sys.argv[1]))
    while True:
        readable, _, _ = select.select([worker, wake_r], [], [])
        if wake_r in readable:
            with contextlib.suppress(BlockingIOError):
                while wake_r.recv(4096):
                    pass
            _tell_ends(worker)
        if worker in readable:
            frame, fds, _, _ = socket.recv_fds(worker, 16, 8)
            if not frame:
                return
            _fork_child(worker, (wake_r, wake_w), fds)


def _tell_ends(worker: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            worker.send(f"{pid} {os.waitstatus_to_exitcode(status)}".encode())


def _fork_child(worker: socket.socket, wake: tuple[socket.socket, socket.socket], fds: list[int]) -> None:
    own_pid = os.getpid()
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(worker, [str(pid).encode()], [pidfd])
        os.close(pidfd)
        return
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (worker, *wake):
            each.close()
        die_with_parent(own_pid)
        serve(*fds)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _main()
