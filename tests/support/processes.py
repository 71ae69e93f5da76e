"""Real processes: each in a group of its own, its output in a file, a deadline on every wait."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Self

from tests.support import pictogram, preloaded
from tests.support.waiting import wait_until

LOOPBACK: Final = "127.0.0.1"
ROOT: Final = Path(__file__).resolve().parents[2]


class ServerError(RuntimeError):
    """A process did not start, become ready or stop; the text ends with the tail of its log."""


def free_ports(count: int) -> list[int]:
    """Different TCP ports of loopback that are free now; another process may take one before it is used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process' environment without settings of shiwu, AWS or Celery and without proxies."""
    dropped = ("SHIWU_", "AWS_", "CELERY_", "PYTEST_", "HF_", "OTEL_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
    return kept | {"AWS_EC2_METADATA_DISABLED": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(extra)


def run_module(*words: str, timeout_s: float, stdin: bytes = b"", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m WORDS` with these environment variables, wait for its end, and return what it printed.

    Raises:
        subprocess.TimeoutExpired: it ran for more than `timeout_s`, and was killed.
    """
    command, env = [sys.executable, "-m", *words], clean_environment(settings)
    start_from = preloaded.current
    if start_from is None or stdin or not start_from.can_start(command, env):
        done = subprocess.run(
            command, cwd=ROOT, env=env, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = start_from.start(command, env=env, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            status = child.wait(timeout_s)
        finally:
            child.send_signal(signal.SIGKILL)
        texts = []
        for each in (stdout, stderr):
            each.seek(0)
            texts.append(each.read().decode())
    return subprocess.CompletedProcess(command, status, *texts)


@contextlib.contextmanager
def undone_by(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` when the block fails or is interrupted: a server that is half started must not stay."""
    with contextlib.ExitStack() as stack:
        stack.callback(stop)
        yield
        stack.pop_all()


class Process:
    """One command: `start`, `stop`, and everything it started is gone afterwards."""

    def __init__(self, command: Sequence[str], *, name: str, folder: Path, env: Mapping[str, str]) -> None:
        self.command = list(command)
        self.name = name
        self.folder = folder
        self.log_path = folder / f"{name}.log"
        self.env = dict(env)
        self._popen: subprocess.Popen[bytes] | preloaded.Child | None = None

    def start(self) -> Self:
        """Start the command; return immediately.

        Raises:
            ServerError: when it runs already.
        """
        if self.is_running:
            raise ServerError(f"{self.name}: expected to be stopped, process {self.pid} runs")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._popen = self._begin(log)
        return self

    def _begin(self, log: IO[bytes]) -> subprocess.Popen[bytes] | preloaded.Child:
        start_from = preloaded.current
        if start_from is not None and start_from.can_start(self.command, self.env):
            return start_from.start(self.command, env=self.env, stdout=log.fileno(), stderr=log.fileno())
        return subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its group."""
        if self._popen is None:
            raise ServerError(f"{self.name}: expected to be started")
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether the process itself lives."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit status, negative for a signal, None while it runs or before it was started."""
        return None if self._popen is None else self._popen.poll()

    def signal(self, number: int) -> None:
        """Send a signal to the process alone, not to its children; one that is gone gets none."""
        if self._popen is not None:
            self._popen.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM and return immediately."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process alone and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait(timeout_s=10)

    def pause(self) -> None:
        """Stop the whole group as a hang would."""
        os.killpg(self.pid, signal.SIGSTOP)
        # The signal is sent, not obeyed, when killpg returns; a thread that runs may still send a command.
        wait_until(self._is_stopped, timeout_s=10, what=f"{self.name} stops")

    def _is_stopped(self) -> bool:
        try:
            states = [path.read_text().rpartition(")")[2].split()[0] for path in self._tasks()]
        except OSError:
            return False  # one has just ended; look again
        return all(state in "TtZX" for state in states)

    def _tasks(self) -> list[Path]:
        return list(Path(f"/proc/{self.pid}/task").glob("*/stat"))

    def resume(self) -> None:
        """Let a paused group go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def wait(self, *, timeout_s: float) -> int:
        """Wait for the end and return the exit status.

        Raises:
            ServerError: when the process still runs after `timeout_s`.
        """
        if self._popen is None:
            raise ServerError(f"{self.name}: expected to be started")
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.error(f"expected to end within {timeout_s} s") from None

    def stop(self, *, timeout_s: float = 30.0) -> int | None:
        """SIGTERM, after `timeout_s` SIGKILL to the group. Return the exit status; may be called twice."""
        if self._popen is None:
            return None
        if self.is_running:
            self.resume()
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        return self._popen.wait(10)

    def log_text(self) -> str:
        """All output up to now."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def log_tail(self, *, lines: int = 30) -> str:
        """The last lines of the output."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def error(self, what: str) -> ServerError:
        """An error that says what was expected, how the process is, and what it said last."""
        state = "it runs" if self.is_running else f"it ended with {self.exit_code}"
        return ServerError(f"{self.name}: {what}, {state}; the end of {self.log_path}:\n{self.log_tail()}")

    def __enter__(self) -> Self:
        with undone_by(self.stop):
            return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class WorkerProcess(Process):
    """A real `shiwu-worker`, or the same by `celery -A shiwu_worker.app worker`.

    `settings` are the worker's own names without prefix: `WorkerProcess(..., lease_s=2, max_batch=8)`. To let it fetch
    from a `PictureServer`, pass `allow_hosts=server.host`. The model has one thread unless `torch_threads` is given,
    and jobs share no images unless `share_images` is. It is the tests' pictogram model with the label set six-zh unless
    `model` is given; "" is the embedded one.
    """

    def __init__(
        self,
        *,
        redis_url: str,
        folder: Path,
        name: str = "worker",
        by_celery: bool = False,
        celery_args: str = "",
        module: str = "shiwu_worker",
        args: str = "",
        env: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.redis_url = redis_url
        self.ready_file = folder / f"{name}.ready"
        self.alive_file = folder / f"{name}.alive"
        own = {
            "SHIWU_REDIS_URL": redis_url,
            "SHIWU_WORKER_NAME": name,
            "SHIWU_READY_FILE": str(self.ready_file),
            "SHIWU_ALIVE_FILE": str(self.alive_file),
            "SHIWU_LOG_FORMAT": "json",
            # Others run beside it: threads that wait for each other at every step of a model take all cores doing so.
            "SHIWU_TORCH_THREADS": "1",
            # Tests and measurements send few images in many jobs, and mean that each is another one.
            "SHIWU_SHARE_IMAGES": "false",
            **pictogram.SETTINGS,
        }
        asked = {f"SHIWU_{key.upper()}": str(value) for key, value in settings.items()}
        celery = ["celery", "-A", "shiwu_worker.app", "worker", *celery_args.split()]
        command = celery if by_celery else [module, *args.split()]
        super().__init__(
            [sys.executable, "-m", *command],
            name=name,
            folder=folder,
            env=clean_environment({**own, **(env or {}), **asked}),
        )

    def start(self) -> Self:
        """Start the worker; `wait_ready` says when it claims."""
        self.ready_file.unlink(missing_ok=True)
        return super().start()

    @property
    def is_ready(self) -> bool:
        """Whether the worker says that it is warm and claims."""
        return self.is_running and self.ready_file.exists()

    def wait_ready(self, *, timeout_s: float = 90.0) -> Self:
        """Wait until the worker claims.

        Raises:
            ServerError: when it ended or is not ready in time.
        """
        what = f"expected to be ready within {timeout_s} s"
        try:
            wait_until(lambda: self.ready_file.exists() or not self.is_running, timeout_s=timeout_s, every_s=0.05)
        except TimeoutError:
            raise self.error(what) from None
        if not self.is_ready:
            raise self.error(what)
        return self
