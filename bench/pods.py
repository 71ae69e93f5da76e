"""Stand-in workers that start and end as pods of a Deployment do."""

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
    """Accepted exit codes: a worker that was not ready yet is ended by the signal."""


class Pods:
    """The wanted number of workers. Not thread-safe; `update` starts and removes workers.

    Args:
        make: returns the worker with this number, not started.
        start_s: time from asking for a pod to its process (node, image), in seconds.
        grace_s: time of a pod between SIGTERM and SIGKILL, in seconds.
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
        """Seconds from SIGTERM to the end, of every ended pod."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scale(self, wanted: int) -> None:
        """Ask for more workers, which start after `start_s`, or end the newest."""
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

    def update(self) -> None:
        """Start due workers and remove ended ones.

        Raises:
            ServerError: a worker ended on its own, with an error, or not within its grace time.
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
        """Number of workers that claim."""
        return sum(worker.ready_file.exists() for worker in self._workers)

    @property
    def processes(self) -> int:
        """Number of running workers, including those that drain."""
        return len(self._workers) + len(self._leaving)

    @property
    def made(self) -> int:
        """Number of workers ever started."""
        return self._made
