"""Runs one Celery worker in this process: `shiwu-worker` on one device, or a worker of the launcher.

The launcher starts it by `python -m shiwu_worker.celery_worker.process PARENT NODE CPUS DRAIN_S [-E]`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import warnings
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.config.errors import load_settings_or_exit, report_unknown_names
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.runtime.malloc import set_up_malloc
from shiwu_worker.runtime.process import exit_now, signal_with_parent
from shiwu_worker.telemetry import logs
from shiwu_worker.telemetry.log_output import open_standard_streams

log: FilteringBoundLogger = structlog.get_logger()
EVENTS: Final = "-E"


def command(*, node: str, cpus: frozenset[int], drain_s: float, task_events: bool) -> list[str]:
    """Return the command line of a worker that this process starts; `main` parses it."""
    arguments = [str(os.getpid()), node, ",".join(map(str, sorted(cpus))), str(drain_s)]
    return [sys.executable, "-m", "shiwu_worker.celery_worker.process", *arguments, *([EVENTS] if task_events else [])]


def begin() -> Settings:
    """Read the settings and set up logs and memory, before a library logs warnings or starts threads.

    With wrong settings the process exits with code 64.
    """
    open_standard_streams()
    settings = load_settings_or_exit()
    logs.set_up(level=settings.log_level, form=settings.log_format)
    report_unknown_names()
    set_up_malloc()
    if settings.labels_dir is not None and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: None)  # the files are about to be read
    return settings


def run(*, node: str, task_events: bool) -> None:
    """Run the Celery worker, and exit the process."""
    # Until the worker installs its handlers: without them, process 1 of a container ignores SIGTERM.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(int(ExitCode.OK)))
    if os.geteuid() == 0:
        # Replaces Celery's warning, which has nine lines and names an option that this command lacks.
        warnings.filterwarnings("ignore", message=".*running the worker with superuser privileges", append=False)
        log.warning("running_as_root", meaning="the worker does not need root; start it as another user")
    from celery.bin.celery import celery  # noqa: PLC0415 the import takes a second, and the launcher does not need it

    args = ["--quiet", "--app", "shiwu_worker.app", "worker", "--loglevel=WARNING", "--hostname", node]
    try:
        celery.main(args=[*args, *([EVENTS] if task_events else [])], prog_name="celery")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        # All parts are closed by now. Python's finalisation of torch would take more than a second of a core.
        exit_now(ended.code or 0)


def drain_with_parent(parent: int, *, limit_s: float) -> None:
    """Drain when the parent process exits: SIGTERM from the kernel, and SIGKILL `limit_s` later.

    Without the launcher nothing restarts this worker, but it can still finish its jobs.
    """
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(0)
    signal_with_parent(parent, signal.SIGTERM, exit_code=0)

    def wait() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        threading.Event().wait(limit_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> None:
    """Apply the placement of the launcher before a library counts the CPUs, and run the worker."""
    parent, node, cpus, drain_s, *rest = sys.argv[1:]
    begin()
    drain_with_parent(int(parent), limit_s=float(drain_s))
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    run(node=node, task_events=EVENTS in rest)


if __name__ == "__main__":
    main()
