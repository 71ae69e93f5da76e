"""What the commands print: tables with lines of text below a row, and data for pipes.

Rich's markup and emoji codes are off, because references and messages come from other people.
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

from shiwu.contract import printable, printable_json

PIPE_COLUMNS: Final = 10_000
"""Width of what goes into a pipe or a file: rows are not wrapped there, so that grep finds whole references."""
GAP: Final = 2
NARROWEST: Final = 24
"""Characters that a text column keeps as long as there is another column to leave out."""


class _Console(Console):
    """Leaves the answer to a closed pipe to the command group, which knows the exit code."""

    def on_broken_pipe(self) -> NoReturn:
        """Report it like a write without Rich."""
        raise BrokenPipeError


def make_console() -> Console:
    """Standard output for people: no markup, no emoji codes, no guessed colours."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Console(markup=False, emoji=False, highlight=False, width=None if is_terminal else PIPE_COLUMNS)


def echo_data(text: str) -> None:
    """Print one line of data: as it is into a pipe or a file, with control characters spelled out on a terminal."""
    click.echo(printable(text) if _is_terminal() else text)


def echo_json(raw: bytes) -> None:
    """Print JSON: as it is into a pipe or a file, with control characters spelled out on a terminal."""
    click.echo(printable_json(raw) if _is_terminal() else raw)


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table and the lines of text below it."""

    cells: Sequence[str]
    notes: Sequence[str] = ()
    red: int | None = None
    """The cell that tells of a failure."""


def print_rows(
    headings: Sequence[str], rows: Iterable[Row], *, text_columns: Sequence[int], optional: Sequence[int]
) -> None:
    """Print a table that is at most as wide as the terminal.

    Args:
        text_columns: indexes of the columns that may wrap.
        optional: indexes of the columns that a narrow terminal does not show; the first one goes first.
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
    """The columns that fit into `width`, each with its own width; `natural` are the widths without a limit."""
    kept = list(range(len(natural)))
    texts = sorted(text_columns, key=lambda i: natural[i])

    def room() -> int:
        """Characters left for the text columns."""
        return width - GAP * len(kept) - sum(natural[i] for i in kept if i not in texts)

    least = sum(min(natural[i], NARROWEST) for i in texts)
    for i in optional:
        if room() < least:
            kept.remove(i)
    left = max(room(), len(texts))
    widths = {i: natural[i] for i in kept}
    # The shortest first, so that the long ones get what it leaves.
    for nth, i in enumerate(texts):
        widths[i] = max(1, min(natural[i], left // (len(texts) - nth)))
        left -= widths[i]
    return widths
