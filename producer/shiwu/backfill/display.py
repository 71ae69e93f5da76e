"""Shows the progress of a backfill: a bar on a terminal, a JSON line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Protocol

import click
from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from shiwu.backfill.runner import Progress
from shiwu.contract import Status, printable

LINE_EVERY_S: Final = 10.0
CODES_SHOWN: Final = 3


class Display(Protocol):
    """Gets the progress about once a second."""

    def __call__(self, progress: Progress) -> None:
        """Show it."""


@contextmanager
def open_display(name: str) -> Iterator[Display]:
    """The display that fits where standard error goes."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield JsonLines(name)
        return
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True, markup=False, emoji=False, highlight=False),
        transient=True,
    ) as bar:
        yield TerminalBar(bar, name)


class JsonLines:
    """One JSON line every ten seconds on standard output."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown_s = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Print a line if it is time."""
        now_s = time.monotonic()
        if now_s - self._shown_s >= LINE_EVERY_S:
            self._shown_s = now_s
            click.echo(to_json({"backfill": self._name} | progress.fields()))


class TerminalBar:
    """A bar with counts, rate, time left, backlog and failures by code."""

    def __init__(self, bar: Bar, name: str) -> None:
        self._bar = bar
        self._task = bar.add_task(printable(name), total=None, text="")

    def __call__(self, progress: Progress) -> None:
        """Update the bar."""
        self._bar.update(self._task, total=progress.total, completed=progress.answered, text=line_of(progress))


def line_of(progress: Progress) -> str:
    """What stands behind the bar."""
    total = "?" if progress.total is None else f"{progress.total:,}"
    parts = [f"{progress.answered:,}/{total}", f"{progress.rate:,.0f}/s"]
    if progress.eta_s is not None and progress.left:
        parts.append(f"{duration(progress.eta_s)} left")
    if progress.unanswered:
        seconds = "" if progress.backlog_s is None else f" ({duration(progress.backlog_s)})"
        parts.append(f"{progress.unanswered:,} waiting{seconds}")
    if failures := failures_of(progress.by_code):
        parts.append(failures)
    if progress.reason:
        parts.append(printable(progress.reason))
    return "  ".join(parts)


def failures_of(by_code: Mapping[str, int]) -> str:
    """The most frequent error codes with their numbers; cancelled jobs are no failures."""
    found = [(code, count) for code, count in by_code.items() if code != Status.CANCELLED]
    shown = ", ".join(f"{count:,} {printable(code)}" for code, count in found[:CODES_SHOWN])
    more = sum(count for _, count in found[CODES_SHOWN:])
    return f"{shown}, {more:,} others" if more else shown


def duration(seconds: float) -> str:
    """A duration for people, as 1:02:03, 2:03 or 3 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
