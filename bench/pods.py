"""Stand-in workers that come and go as pods of a Deployment do."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from bench.workers import StandInWorker


@dataclass(slots=True)
class _Leaving:
    worker: StandInWorker
    since_s: float
    codes: tuple[int, ...]
    """Exit codes that are well: one that had not begun yet ends by the signal itself."""


class Pods:
    """As many workers as were asked for last. Not thread-safe; `look` moves things on.

    Args:
        make: a worker of this number, not started.
        start_s: from the wish for a pod to its process: its node, its image.
        grace_s: what a pod has between SIGTERM and SIGKILL.
    """

    def __init__(self, make: Callable[[int], StandInWorker], *, start_s: float, grace_s: float) -> None:
        self._make = make
        self._start_s = start_s
        self._grace_s = grace_s
        self._stack = ExitStack()
        self._due_s: list[float] = []
        self._workers: list[StandInWorker] = []
        self._leaving: list[_Leaving] = []
        self._made = 0
        self.drains_s: list[float] = []
        """From SIGTERM to the end, of every pod that went."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scale(self, wanted: int) -> None:
        """Ask for more, which start after a while, or take away the newest."""
        now_s = time.monotonic()
        while len(self._due_s) + len(self._workers) < wanted:
            self._due_s.append(now_s + self._start_s)
        while self._due_s and len(self._due_s) + len(self._workers) > wanted:
            self._due_s.pop()
        while len(self._workers) > wanted:
            worker = self._workers.pop()
            codes = (0,) if worker.ready_file.exists() else (0, -signal.SIGTERM)
            worker.terminate()
            self._leaving.append(_Leaving(worker, now_s, codes))

    def look(self) -> None:
        """Start what is due, and see off what has ended.

        Raises:
            ServerError: a worker ended by itself, with an error, or not within its grace.
        """
        now_s = time.monotonic()
        while self._due_s and self._due_s[0] <= now_s:
            self._due_s.pop(0)
            self._workers.append(self._stack.enter_context(self._make(self._made)))
            self._made += 1
        for worker in self._workers:
            worker.check()
        for leaving in list(self._leaving):
            if not leaving.worker.is_running:
                if leaving.worker.exit_code not in leaving.codes:
                    raise leaving.worker.error("expected exit code 0 after SIGTERM")
                self.drains_s.append(now_s - leaving.since_s)
                self._leaving.remove(leaving)
            elif now_s - leaving.since_s > self._grace_s:
                raise leaving.worker.error(f"expected to have drained within {self._grace_s:g} s")

    @property
    def ready(self) -> int:
        """Workers that claim."""
        return sum(worker.ready_file.exists() for worker in self._workers)

    @property
    def processes(self) -> int:
        """Workers that run, those that drain too."""
        return len(self._workers) + len(self._leaving)

    @property
    def made(self) -> int:
        """All that ever started."""
        return self._made
