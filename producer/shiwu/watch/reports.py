"""Says what a watcher does: one JSON line for each portion, problems on standard error, and metrics."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import click
from pydantic_core import to_json

from shiwu.contract import printable, without_logins
from shiwu.watch.intake import Plan

if TYPE_CHECKING:
    from shiwu.watch.metrics import WatchMetrics
    from shiwu.watch.rules import Rules

REPORT_EVERY_S = 30.0
"""Seconds between two lines about the same problem."""


class ConsoleReports:
    """Prints, and passes numbers on to the metrics if there are any. Thread-safe."""

    def __init__(self, metrics: WatchMetrics | None) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._problems: dict[str, float] = {}
        """What has a problem → when it was last printed, by the monotonic clock."""

    def started(self, source: str, rules: Rules) -> None:
        """Say what is watched, because nothing else is printed until the first event."""
        count = len(rules.all)
        click.echo(f"shiwu: watching {printable(without_logins(source))}, {count} rule{'s' * (count != 1)}", err=True)

    def portion(self, *, messages: int, plan: Plan, duration_s: float) -> None:
        """Print and count a portion."""
        counts = {str(outcome): count for outcome, count in sorted(plan.counts.items())}
        click.echo(to_json({"messages": messages, **counts, "seconds": round(duration_s, 4)}))
        if self._metrics is not None:
            self._metrics.portion(messages=messages, plan=plan, duration_s=duration_s)

    def source(self, problem: str = "") -> None:
        """The source answers, or does not because of this problem."""
        self._note("the source", problem)
        if self._metrics is not None:
            self._metrics.source(is_up=not problem)

    def lanes(self, problem: str = "") -> None:
        """The lanes take jobs, or do not because of this problem."""
        self._note("the lanes", problem)
        if self._metrics is not None:
            self._metrics.waiting(is_waiting=bool(problem))

    def refused(self, status: int) -> None:
        """Count an HTTP request that was refused."""
        if self._metrics is not None:
            self._metrics.refused(status)

    def _note(self, what: str, problem: str) -> None:
        with self._lock:
            printed_s = self._problems.get(what)
            now_s = time.monotonic()
            if not problem:
                self._problems.pop(what, None)
                line = f"{what}: going on" if printed_s is not None else ""
            elif printed_s is None or now_s - printed_s >= REPORT_EVERY_S:
                self._problems[what] = now_s
                line = f"{printable(without_logins(problem))}; waiting"
            else:
                line = ""
        if line:
            click.echo(f"shiwu: {line}", err=True)
