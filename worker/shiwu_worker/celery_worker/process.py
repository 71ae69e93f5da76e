"""One Celery worker in this process: the whole of `shiwu-worker` on one device, or a launcher's child.

The launcher starts it by `python -m shiwu_worker.celery_worker.process PARENT NODE CPUS DRAIN_S [-E]`.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import warnings
from typing import Any, Final

import structlog

from shiwu_worker.config.errors import load_settings_or_exit, report_unknown_names
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.runtime.malloc import use_one_arena
from shiwu_worker.runtime.process import PR_SET_PDEATHSIG
from shiwu_worker.telemetry import logs
from shiwu_worker.telemetry.log_output import open_standard_streams

log: Any = structlog.get_logger()
EVENTS: Final = "-E"


def command(*, node: str, cpus: frozenset[int], drain_s: float, task_events: bool) -> list[str]:
    """The command line of a child of this process; `main` reads it."""
    told = [str(os.getpid()), node, ",".join(map(str, sorted(cpus))), str(drain_s)]
    return [sys.executable, "-m", "shiwu_worker.celery_worker.process", *told, *([EVENTS] if task_events else [])]


def begin() -> Settings:
    """Read the settings and set up log and memory, before a library warns or starts threads.

    Wrong settings end the process with the exit code for settings.
    """
    open_standard_streams()
    settings = load_settings_or_exit()
    logs.set_up(level=settings.log_level, form=settings.log_format)
    report_unknown_names()
    use_one_arena()
    return settings


def run(*, node: str, task_events: bool) -> None:
    """Be the Celery worker; ends the process."""
    # Until the worker has handlers of its own. As the first process of a container it would ignore SIGTERM otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(int(ExitCode.OK)))
    if os.geteuid() == 0:
        # In place of Celery's warning, which has nine lines and names an option that this command does not have.
        warnings.filterwarnings("ignore", message=".*running the worker with superuser privileges", append=False)
        log.warning("running_as_root", meaning="the worker needs no rights of root; start it as another user")
    from celery.bin.celery import celery  # noqa: PLC0415 it takes a second to import, and the launcher needs none

    args = ["--quiet", "--app", "shiwu_worker.app", "worker", "--loglevel=WARNING", "--hostname", node]
    celery.main(args=[*args, *([EVENTS] if task_events else [])], prog_name="celery")


def drain_with_parent(parent: int, *, limit_s: float) -> None:
    """When the parent ends, get SIGTERM from the kernel, and SIGKILL `limit_s` later if still there.

    Nobody would restart this worker any more, but it can still finish what it holds.
    """
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(0)

    def wait() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        threading.Event().wait(limit_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> None:
    """Take the place that the launcher chose, before a library counts the CPUs."""
    parent, node, cpus, drain_s, *rest = sys.argv[1:]
    begin()
    drain_with_parent(int(parent), limit_s=float(drain_s))
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    run(node=node, task_events=EVENTS in rest)


if __name__ == "__main__":
    main()
