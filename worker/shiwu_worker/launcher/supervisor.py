"""Supervisor: starts one worker process for each placement, restarts those that crash, exits when all have exited.

It loads neither torch nor Celery and touches no job. Workers inherit its stdout and stderr. If the supervisor is
killed, its workers drain (`celery_worker.process.drain_with_parent`), because nothing would restart them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.errors import BROKEN_DEVICE, ExitCode
from shiwu_worker.health.probe_files import ProbeFiles, is_probe_file
from shiwu_worker.launcher.placement import Placement

log: FilteringBoundLogger = structlog.get_logger()
PROBE_FILES_EVERY_S: Final = 1.0
"""Interval of the updates of the probe files."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often a worker may crash, and how long restarts and draining may take."""

    first_pause_s: float = 1.0
    """Pause before the first restart; doubles with each further crash in a row."""
    longest_pause_s: float = 60.0
    max_crashes: int = 6
    """Crashes in a row after which a worker is retired."""
    retired_s: float = 600.0
    """Pause before a retired worker is tried again."""
    stable_after_s: float = 300.0
    """A worker that ran this long before it crashed starts a new count."""
    hung_after_s: float = 60.0
    """A worker that has not touched its alive file for this long is killed."""
    drain_s: float
    """Time from the first signal until workers are killed."""
    after_grace_s: float = 18.0
    """The part of it after the grace time, which workers also have after a second signal."""


class WorkerProcess:
    """One placement and its process."""

    def __init__(self, placement: Placement, command: Sequence[str]) -> None:
        self.placement = placement
        self.start_due_s: float | None = 0.0
        """Monotonic time of the next start; None while it runs or if it is not started again."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._crashes = 0
        self.is_retired = False
        """Whether it crashed too often, or its GPU is broken, and the others go on without it."""
        self.is_hung = False
        """Whether it was killed because it made no progress. A process in a hung driver may not end even so."""
        self._touched_s: float | None = None
        self._still_s = 0.0

    @property
    def is_running(self) -> bool:
        """Whether there is a process whose exit was not collected yet."""
        return self._process is not None

    @property
    def is_finished(self) -> bool:
        """Whether no process runs and none will be started."""
        return self._process is None and self.start_due_s is None

    def start(self) -> None:
        """Start the process in its own session, so that Ctrl-C reaches the launcher only, which passes it on."""
        self._remove_files()
        self.start_due_s = None
        self.is_retired = self.is_hung = False
        self._touched_s, self._still_s = None, 0.0
        self._started_s = time.monotonic()
        environment = os.environ | dict(self.placement.environment)
        self._process = subprocess.Popen(
            self._command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        cpus = len(self.placement.cpus)
        log.info(
            "worker_started", worker=self.placement.name, pid=self._process.pid, node=self.placement.node, cpus=cpus
        )

    def collect_exit(self) -> int | None:
        """Return the exit status if the process has just exited, negative for a signal; otherwise None."""
        status = None if self._process is None else self._process.poll()
        if status is not None:
            self._process = None
            self._remove_files()
        return status

    def signal(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill_if_hung(self, passed_s: float, restart_policy: RestartPolicy) -> bool:
        """Kill the process if it has not touched its alive file for too long; return whether it was killed now.

        A worker that has not started yet has no such file.

        Args:
            passed_s: seconds since the last call.
        """
        touched_s = _touched_s(self.placement.alive_file)
        # A clock that is set forward, or a machine that is paused, must not count.
        self._still_s = self._still_s + min(passed_s, 2 * PROBE_FILES_EVERY_S) if touched_s == self._touched_s else 0.0
        self._touched_s = touched_s
        if self.is_hung or touched_s is None or self._still_s < restart_policy.hung_after_s:
            return False
        self.is_hung = True
        self.signal(signal.SIGKILL)
        return True

    def count_crash(self, restart_policy: RestartPolicy) -> float | None:
        """Count a crash. Return the seconds until the next start, or None after too many crashes."""
        ran_s = time.monotonic() - self._started_s
        self._crashes = 1 if ran_s >= restart_policy.stable_after_s else self._crashes + 1
        if self._crashes >= restart_policy.max_crashes:
            return None
        pause_s = min(restart_policy.longest_pause_s, restart_policy.first_pause_s * 2.0 ** (self._crashes - 1))
        self.start_due_s = time.monotonic() + pause_s
        return pause_s

    def retire(self, restart_policy: RestartPolicy) -> None:
        """Start it again only after a long pause; if it then crashes soon, it is retired again."""
        self.is_retired = True
        self.start_due_s = time.monotonic() + restart_policy.retired_s

    def _remove_files(self) -> None:
        for path in (self.placement.ready_file, self.placement.alive_file):
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


class Supervisor:
    """Runs the workers of one machine.

    Args:
        placements: one for each worker.
        command: makes the command line of a worker.
        restart_policy: limits for workers that crash or do not exit.
        probe_files: ready while all workers are ready, so not while one is retired; touched at the time of the worker
            that is furthest behind.
        has_files: SIGHUP is passed on, so that workers read files again; otherwise it stops them.
        fault_of: why a GPU with this UUID cannot be used before an operator has acted; None without a reason.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        *,
        command: Callable[[Placement], list[str]],
        restart_policy: RestartPolicy,
        probe_files: ProbeFiles,
        fault_of: Callable[[str], str | None] = lambda _: None,
        has_files: bool = False,
    ) -> None:
        self._workers = [WorkerProcess(placement, command(placement)) for placement in placements]
        self._restart_policy = restart_policy
        self._probe_files = probe_files
        self._fault_of = fault_of
        self._has_files = has_files
        self._is_ready: bool | None = None
        self._code: int | None = None
        """The exit code, once the shutdown has begun."""
        self._kill_at_s = float("inf")
        self._checked_s = time.monotonic()

    def run(self) -> int:
        """Run until all workers have exited and none is started again; return the exit code."""
        with _signals() as wait:
            while self._step():
                for number in wait(self._pause_s()):
                    self._on_signal(number)
        log.info("launcher_ended", exit_code=self._code or 0)
        return self._code or 0

    def _step(self) -> bool:
        """Handle exits, starts and the time limit. Return whether a worker is left."""
        for worker in self._workers:
            if (status := worker.collect_exit()) is not None:
                self._on_exit(worker, status)
            if worker.start_due_s is not None and worker.start_due_s <= time.monotonic():
                self._start(worker)
        self._kill_hung()
        self._update_probe_files()
        if all(worker.is_finished for worker in self._workers):
            return False
        if time.monotonic() >= self._kill_at_s:
            self._kill()
        return True

    def _kill_hung(self) -> None:
        """Kill workers without progress, so that they are restarted: no other program looks at each of them.

        A call of a driver whose GPU has failed may never return.
        """
        now_s = time.monotonic()
        passed_s, self._checked_s = now_s - self._checked_s, now_s
        for worker in self._workers:
            if self._code is None and worker.is_running and worker.kill_if_hung(passed_s, self._restart_policy):
                log.error(
                    "worker_hung",
                    worker=worker.placement.name,
                    after_s=self._restart_policy.hung_after_s,
                    meaning="it has work and makes no progress, and is killed; its leases expire by themselves",
                )

    def _start(self, worker: WorkerProcess) -> None:
        try:
            worker.start()
        except OSError as error:  # for example out of memory or process ids
            log.error("worker_not_started", worker=worker.placement.name, error=str(error))
            self._on_crash(worker, reason="not started")

    def _on_exit(self, worker: WorkerProcess, status: int) -> None:
        reason = _reason(status)
        if self._code is not None:
            log.info("worker_ended", worker=worker.placement.name, status=status, reason=reason)
            # SIGTERM kills a worker that has not installed its handlers yet; it holds no job.
            if status not in {0, -signal.SIGTERM}:
                self._code = self._code or (status if status > 0 else ExitCode.OVERDUE)
        elif status == ExitCode.OK:
            log.info("worker_ended", worker=worker.placement.name, status=status, reason=reason)
        elif status == ExitCode.CONFIG:
            log.error("worker_ended", worker=worker.placement.name, status=status, reason=reason)
            self._shut_down(ExitCode.CONFIG)  # a restarted worker would read the same settings
        else:
            self._on_crash(worker, reason=reason, status=status)

    def _on_crash(self, worker: WorkerProcess, *, reason: str, status: int | None = None) -> None:
        uuid = worker.placement.gpu_uuid
        # Only then, because a GPU with broken rows may work on for weeks.
        fault = self._fault_of(uuid) if uuid and (status in BROKEN_DEVICE or worker.is_hung) else None
        pause_s = worker.count_crash(self._restart_policy)
        if fault is None and pause_s is not None:
            log.error("worker_crashed", worker=worker.placement.name, reason=reason, restart_in_s=pause_s)
            return
        worker.start_due_s = None
        left = [other.placement.name for other in self._workers if not (other.is_retired or other.is_finished)]
        if not left:
            crashes = self._restart_policy.max_crashes
            log.error("restarts_exhausted", worker=worker.placement.name, reason=fault or reason, crashes=crashes)
            self._shut_down(ExitCode.GAVE_UP)
            return
        worker.retire(self._restart_policy)
        log.error(
            "worker_retired",
            worker=worker.placement.name,
            reason=reason,
            gpu_fault=fault,
            retry_in_s=self._restart_policy.retired_s,
            workers_left=len(left),
            meaning="this machine is not ready; the other workers go on",
        )

    def _on_signal(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        if number == signal.SIGHUP and self._has_files:
            self._signal_all(signal.SIGHUP)
            return
        if self._code is None:
            self._shut_down(ExitCode.OK)
            return
        # A second signal makes a worker release its jobs immediately.
        self._kill_at_s = min(self._kill_at_s, time.monotonic() + self._restart_policy.after_grace_s)
        self._signal_all(signal.SIGTERM)

    def _shut_down(self, code: ExitCode) -> None:
        """Start no more workers, and ask all to drain."""
        if self._code is not None:
            return
        log.info("launcher_stopping", exit_code=int(code), reason=code.name if code else "asked to")
        self._code = int(code)
        self._kill_at_s = time.monotonic() + self._restart_policy.drain_s
        for worker in self._workers:
            worker.start_due_s = None
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for worker in self._workers:
            worker.signal(number)

    def _kill(self) -> None:
        overdue = [worker.placement.name for worker in self._workers if worker.is_running]
        log.error("workers_overdue", workers=overdue, after_s=self._restart_policy.drain_s)
        self._code = self._code or int(ExitCode.OVERDUE)
        self._kill_at_s = time.monotonic() + self._restart_policy.after_grace_s
        self._signal_all(signal.SIGKILL)

    def _pause_s(self) -> float:
        """Return the time until the next start, update or limit. Exits and signals interrupt the wait."""
        starts_s = [worker.start_due_s for worker in self._workers if worker.start_due_s is not None]
        return max(0.0, min([time.monotonic() + PROBE_FILES_EVERY_S, self._kill_at_s, *starts_s]) - time.monotonic())

    def _update_probe_files(self) -> None:
        running = [worker for worker in self._workers if worker.is_running and not worker.is_hung]
        is_complete = bool(running) and all(worker in running or worker.is_finished for worker in self._workers)
        is_ready = is_complete and all(_touched_s(worker.placement.ready_file) is not None for worker in running)
        if is_ready != self._is_ready and self._probe_files.set_ready(is_ready=is_ready):
            self._is_ready = is_ready
        touched_s = [_touched_s(worker.placement.alive_file) for worker in running]
        if known_s := [each for each in touched_s if each is not None]:
            self._probe_files.touch_alive(at_s=min(known_s))


def _touched_s(path: Path | None) -> float | None:
    """When a worker touched its file, as Unix time; None without a file, for a link, and where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime if path is not None and is_probe_file(path) else None
    return None


def _reason(status: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name if status < 0 else ExitCode(status).name
    return f"status {status}"


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[float], bytes]]:
    """Yield a function that waits up to a number of seconds and returns the numbers of received signals."""
    write_end, read_end = socket.socketpair()
    with write_end, read_end:
        write_end.setblocking(False)
        read_end.setblocking(False)
        before_fd = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        # A signal that is ignored, as by nohup, stays ignored.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda *_: None) for number in (*handled, signal.SIGCHLD)}

        def wait(limit_s: float) -> bytes:
            readable, _, _ = select.select([read_end], [], [], limit_s)
            return read_end.recv(4096) if readable else b""

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(before_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
