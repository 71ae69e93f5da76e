"""Workers and commands that start with the libraries imported: forks of one process that has imported them once.

The imports of torch, transformers and Celery take five of the six CPU seconds of a worker's start, and the tests start
some 200 workers and 200 commands. What runs is `python -m MODULE ARGS` with its own environment, session, working
directory and output. A process whose environment the libraries read while they are imported gets its own interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

LIBRARIES: Final = (
    "boto3",
    "celery.bin.celery",
    "celery.worker",
    "kombu.transport.redis",
    "msgspec",
    "PIL.Image",
    "prometheus_client",
    "pydantic_settings",
    "redis.asyncio",
    "structlog",
    "torch",
    "transformers.models.chinese_clip.modeling_chinese_clip",
    "transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder",
)
"""Third-party modules only: the project's own are imported by each process."""
OWN_NAMES: Final = ("SHIWU_", "AWS_", "OTEL_", "FAULT_FILE")
"""Environment variables that no library reads while it is imported."""
START_S: Final = 120.0
MAX_REQUEST: Final = 1 << 20

current: Preloaded | None = None
"""What the workers of this process start from; the fixture of conftest.py sets it. None: each has its interpreter."""


class Child:
    """A process of `Preloaded`, with the methods of `subprocess.Popen` that the tests use. For one thread."""

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: when it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._read_status()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _read_status(self) -> None:
        text = os.read(self._ended, 64)
        os.close(self._ended)
        self.returncode = int(text) if text else -signal.SIGKILL  # no text: the process that forks was killed


class Preloaded:
    """The process that has imported the libraries; it starts with the first worker."""

    def __init__(self, *, root: Path, env: Mapping[str, str], libraries: Sequence[str] = LIBRARIES) -> None:
        self._root, self._env, self._libraries = root, dict(env), libraries
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def can_start(self, command: Sequence[str], env: Mapping[str, str]) -> bool:
        """Whether this is `python -m MODULE` with an environment that differs in no name that a library reads."""
        changed = {name for name, _ in self._env.items() ^ env.items()}
        return list(command[:2]) == [sys.executable, "-m"] and all(name.startswith(OWN_NAMES) for name in changed)

    def start(self, command: Sequence[str], *, env: Mapping[str, str], stdout: int, stderr: int) -> Child:
        """Start `python -m MODULE ARGS` in a session of its own, with its output to these files.

        Raises:
            RuntimeError: the process that forks did not answer.
        """
        control = self._socket or self._begin()
        ended, tell = os.pipe()
        try:
            request = json.dumps({"command": list(command[2:]), "env": dict(env)}).encode()
            socket.send_fds(control, [request], [stdout, stderr, tell])
        finally:
            os.close(tell)
        reply = control.recv(64)
        if not reply:
            os.close(ended)
            raise RuntimeError("expected the process that has imported the libraries to start a worker, but it ended")
        return Child(int(reply), ended)

    def stop(self) -> None:
        """End the process that forks; its children go on."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(START_S)
            self._socket = self._process = None

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.settimeout(START_S)
            for side in (ours, theirs):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.preloaded", str(theirs.fileno()), *self._libraries],
                cwd=self._root,
                env=self._env,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        return ours


class _Server:
    """Forks a process for each request, and reports how each ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}
        """The pipe to which the exit status of each child is written."""

    def serve(self) -> list[str] | None:
        """Return the command in each forked process, and None when the tests have closed the connection."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(read, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if read in ready:
                    os.read(read, 4096)
                    self._report_ended()
                if self._control.fileno() in ready:
                    request, fds, _, _ = socket.recv_fds(self._control, MAX_REQUEST, 3)
                    if not request:
                        return None
                    if (pid := os.fork()) == 0:
                        break
                    self._children[pid] = fds.pop()
                    for each in fds:
                        os.close(each)
                    self._control.send(str(pid).encode())
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (read, write, fds.pop(), *self._children.values()):
            os.close(each)
        self._control.close()
        return _become(json.loads(request), output=fds)

    def _report_ended(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            tell = self._children.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # no test waits for it any more
                os.write(tell, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(tell)


def _become(request: Mapping[str, object], *, output: Sequence[int]) -> list[str]:
    """Take on the session, the output and the environment that the request asks for; return its command."""
    os.setsid()
    for number, each in enumerate(output, start=1):
        os.dup2(each, number)
        os.close(each)
    env, command = request["env"], request["command"]
    assert isinstance(env, dict)
    assert isinstance(command, list)
    os.environ.clear()
    os.environ.update(env)
    from numpy import random  # noqa: PLC0415 in the processes that fork only

    random.seed()  # otherwise all workers draw the same numbers
    return [str(word) for word in command]


class _QuickEnd:
    """Ends a child when its exit functions have run: to free what it shares would copy it, 0.3 CPU seconds each."""

    status: int | None = None

    def __call__(self) -> None:
        """Be the last exit function; threads have ended before."""
        if self.status is None:  # the process that forks, or an end by Ctrl-C
            return
        with contextlib.suppress(OSError, ValueError):  # the interpreter reports them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status & 0xFF)

    def run(self, module: str) -> None:
        """Run a module as `python -m` does, and note the exit status that it asks for."""
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            self.status = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        except Exception:  # border: the interpreter prints it and ends with 1
            self.status = 1
            raise
        self.status = 0


def _main() -> None:
    end = _QuickEnd()
    atexit.register(end)  # before any other, so that it is called after all others
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # A collection in a child visits, and so copies, all that was imported: a second of CPU, at its end at the latest.
    gc.collect()
    gc.freeze()
    command = _Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    if command is not None:
        sys.argv[1:] = command[1:]
        end.run(command[0])


if __name__ == "__main__":
    _main()
