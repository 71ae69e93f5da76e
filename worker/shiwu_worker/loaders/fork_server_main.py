"""The fork server's process. `fork_server` starts it with `python -m`, a file descriptor and the pid of the worker.

It replies to each request, which comes with file descriptors, with the pid and pidfd of a forked loader, and reports
the exit status of each loader that ends.
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
    """Fork on request and report exits, until the worker has ended."""
    die_with_parent(int(sys.argv[2]))
    no_new_privileges()
    warm()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Objects that exist now stay in memory shared with every loader.
    gc.freeze()
    wake_reader, wake_writer = socket.socketpair()
    wake_writer.setblocking(False)
    wake_reader.setblocking(False)
    signal.set_wakeup_fd(wake_writer.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = socket.socket(fileno=int(sys.argv[1]))
    while True:
        readable, _, _ = select.select([worker, wake_reader], [], [])
        if wake_reader in readable:
            with contextlib.suppress(BlockingIOError):
                while wake_reader.recv(4096):
                    pass
            _report_exits(worker)
        if worker in readable:
            frame, fds, _, _ = socket.recv_fds(worker, 16, 8)
            if not frame:
                return
            _fork_child(worker, (wake_reader, wake_writer), fds)


def _report_exits(worker: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (exited := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = exited
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
        for inherited in (worker, *wake):
            inherited.close()
        die_with_parent(own_pid)
        serve(*fds)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _main()
