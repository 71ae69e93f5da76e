"""Prints tables with notes below a row, and data for pipes.

Rich's markup and emoji codes are off, because references and messages are input from other parties.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import click
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shiwu.contract import moment, printable, printable_json

PIPE_COLUMNS: Final = 10_000
"""Width of output into a pipe or a file: rows are not wrapped there, so that grep finds whole references."""
GAP: Final = 2
"""Spaces between two columns."""
MIN_TEXT_WIDTH: Final = 24
"""An optional column is left out before a text column becomes narrower than this."""


class _Console(Console):
    """Leaves the handling of a closed pipe to the command group, which chooses the exit code."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error that a write without Rich raises."""
        raise BrokenPipeError


def make_console() -> Console:
    """Standard output for people, without markup, emoji codes and syntax colours."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Console(markup=False, emoji=False, highlight=False, width=None if is_terminal else PIPE_COLUMNS)


def echo_data(text: str) -> None:
    """Print one line of data: unchanged into a pipe or a file, with control characters escaped on a terminal.

    Line breaks are always escaped, because an id with one would be two ids to the next command of a pipe.
    """
    is_one_line = text.splitlines() in ([], [text])
    click.echo(text if is_one_line and not _is_terminal() else printable(text))


def echo_json(raw: bytes) -> None:
    """Print JSON: unchanged into a pipe or a file, with control characters escaped on a terminal."""
    click.echo(printable_json(raw) if _is_terminal() else raw)


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def span_text(ms: float) -> str:
    """A duration in milliseconds for people: `8.2 ms`, `41 ms`, `1.5 s`, `3 min`, `2.1 h`."""
    if ms < 1000:
        return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def moment_text(ms: float) -> str:
    """A time in ms since 1970 as `2026-11-30T17:10:35Z`."""
    return moment(ms).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table and the lines of text below it."""

    cells: Sequence[str]
    notes: Sequence[str] = ()
    red: int | None = None
    """Index of the cell with an error, which is printed in red."""


def print_rows(
    headings: Sequence[str], rows: Iterable[Row], *, text_columns: Sequence[int], optional: Sequence[int]
) -> None:
    """Print a table that is at most as wide as the terminal.

    Args:
        text_columns: indexes of the columns that may wrap.
        optional: indexes of the columns that are left out on a narrow terminal, in this order.
    """
    console = make_console()
    shown = [
        Row(
            cells=[printable(cell) for cell in row.cells],
            notes=[printable(note) for note in row.notes],
            red=row.red,
        )
        for row in rows
    ]
    natural = [
        max([cell_len(heading), *(cell_len(row.cells[i]) for row in shown)]) for i, heading in enumerate(headings)
    ]
    widths = fit_columns(natural, width=console.width, text_columns=text_columns, optional=optional)
    for row in [Row(headings), *shown]:
        line = Table.grid(padding=(0, GAP, 0, 0))
        for width in widths.values():
            line.add_column(width=width, overflow="fold")
        style = "bold" if row.cells is headings else ""
        line.add_row(*[Text(row.cells[i], style="red" if row.red == i else style) for i in widths])
        console.print(line)
        for note in row.notes:
            console.print(Padding(Text(note), (0, 0, 0, 4), expand=False))


def fit_columns(
    natural: Sequence[int], *, width: int, text_columns: Sequence[int], optional: Sequence[int]
) -> dict[int, int]:
    """Column index → width, for the columns that fit into `width`; `natural` are the widths without a limit."""
    kept = list(range(len(natural)))
    texts = sorted(text_columns, key=lambda i: natural[i])

    def text_width() -> int:
        """Characters left for the text columns."""
        return width - GAP * len(kept) - sum(natural[i] for i in kept if i not in texts)

    least = sum(min(natural[i], MIN_TEXT_WIDTH) for i in texts)
    for i in optional:
        if text_width() < least:
            kept.remove(i)
    left = max(text_width(), len(texts))
    widths = {i: natural[i] for i in kept}
    # The shortest column first, so that the longer ones share the rest.
    for nth, i in enumerate(texts):
        widths[i] = max(1, min(natural[i], left // (len(texts) - nth)))
        left -= widths[i]
    return widths
