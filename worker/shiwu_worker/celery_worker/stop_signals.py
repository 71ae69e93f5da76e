"""Handlers of the signals that stop a worker, in place of Celery's.

Celery's handlers print to standard output between JSON lines, exit with code 1 on Ctrl-C, and have no effect while a
model loads.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from celery import signals
from celery.worker import state

from shiwu_worker.errors import ExitCode

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class StopSignals:
    """SIGTERM or Ctrl-C drains the worker; a second signal, or SIGQUIT, makes it release its jobs immediately.

    During the start one signal exits the process. Used in the main thread only. With
    `has_files` SIGHUP has files read again; otherwise it counts as SIGTERM, unless it is ignored.
    """

    def __init__(self, hostname: str) -> None:
        self._hostname = hostname
        self._hurry: Callable[[], None] | None = None
        self._has_files = False
        self._reload: Callable[[], None] = lambda: None
        self.count = 0
        """Number of these signals received."""
        self._first_s = 0.0

    def age_s(self) -> float:
        """Seconds since the first signal; 0 without one. Celery may notice a signal late while Redis is slow."""
        return time.monotonic() - self._first_s if self.count else 0.0

    def install(self, *, has_files: bool = False) -> None:
        """Install the handlers. Until `started` is called, a signal raises SystemExit(0) in the main thread.

        Args:
            has_files: SIGHUP stops nothing, because there are files that are read again.
        """
        self._has_files = has_files
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # Celery's own handler would start the process anew. A signal that is ignored, as by nohup, stays ignored.
        before = signal.getsignal(signal.SIGHUP)
        if before == signal.SIG_DFL or (has_files and before != signal.SIG_IGN):
            signal.signal(signal.SIGHUP, self._on_signal)

    def started(self, hurry: Callable[[], None], *, reload: Callable[[], None] = lambda: None) -> None:
        """From now on a signal asks Celery's loop to end, a further signal calls `hurry`, and SIGHUP `reload`."""
        self._hurry = hurry
        self._reload = reload

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._has_files:
            self._reload()
            return
        self.count += 1
        state.should_stop = int(ExitCode.OK)
        if self.count == 1:
            self._first_s = time.monotonic()
            name = signal.Signals(number).name
            signals.worker_shutting_down.send(sender=self._hostname, sig=name, how="Warm", exitcode=int(ExitCode.OK))
            if self._hurry is None:
                sys.exit(int(ExitCode.OK))
        if self._hurry is not None and (self.count > 1 or number == signal.SIGQUIT):
            self._hurry()
