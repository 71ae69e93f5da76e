"""The signals that end a worker, in place of Celery's own handlers.

Celery's handlers print to standard output in the middle of a JSON log, end Ctrl-C with exit code 1, and are not looked
at while a model is loading.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final

from celery import signals
from celery.worker import state

from shiwu_worker.errors import ExitCode

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class StopSignals:
    """SIGTERM or Ctrl-C drains the worker; a second one, or SIGQUIT, gives back at once; during the start it ends it.

    Install it in the main thread. SIGHUP counts as SIGTERM where a closing terminal would otherwise kill the worker.
    """

    def __init__(self, hostname: str) -> None:
        self._hostname = hostname
        self._hurry: Callable[[], None] | None = None
        self.count = 0
        """How many such signals have come."""

    def install(self) -> None:
        """Take the signals over. Until `started` is called, one of them ends the start with SystemExit(0)."""
        for number in ENDING:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_signal)

    def started(self, hurry: Callable[[], None]) -> None:
        """From now on a signal asks Celery's loop to end, and `hurry` is what a further one calls."""
        self._hurry = hurry

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        state.should_stop = int(ExitCode.OK)
        if self.count == 1:
            name = signal.Signals(number).name
            signals.worker_shutting_down.send(sender=self._hostname, sig=name, how="Warm", exitcode=int(ExitCode.OK))
            if self._hurry is None:
                sys.exit(int(ExitCode.OK))
        if self._hurry is not None and (self.count > 1 or number == signal.SIGQUIT):
            self._hurry()
