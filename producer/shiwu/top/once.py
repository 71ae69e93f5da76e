"""A look as tables in the scrolling terminal, without Textual."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from shiwu.cli.terminal import GAP, make_console
from shiwu.top import rows
from shiwu.top.look import Look

SPARK_WIDTH: Final = 20
BAR_WIDTH: Final = 30
NARROW_WORKER: Final = 8
"""Columns of a worker on a terminal below 120 columns."""


def print_look(look: Look) -> None:
    """Print one look."""
    print_tables(make_console(), look)


def print_tables(console: Console, look: Look) -> None:
    """Print the tables of a look on this console."""
    lanes = [(*rows.lane_cells(lane), rows.spark(lane.history, width=SPARK_WIDTH)) for lane in look.lanes]
    _print(console, (*rows.LANE_HEADINGS, ""), lanes)
    console.print(rows.totals_line(look))
    if look.stages:
        console.print(f"\nwhere time goes, newest {look.sample} tagged answers")
        stages = [(*rows.stage_cells(stage), rows.bar(stage.share, width=BAR_WIDTH)) for stage in look.stages]
        _print(console, (*rows.STAGE_HEADINGS, ""), stages)
    console.print(f"\n{rows.workers_text(look)}, {rows.number(look.images_per_s)} images/s")
    if look.workers:
        most = NARROW_WORKER if console.width < 120 else len(rows.WORKER_HEADINGS)
        _print(console, rows.WORKER_HEADINGS[:most], [rows.worker_cells(worker)[:most] for worker in look.workers])
    if look.failures:
        console.print()
        headings = (rows.failures_heading(look), *rows.FAILURE_HEADINGS[1:])
        _print(console, headings, [rows.failure_cells(failure) for failure in look.failures])
    if look.shards:
        console.print()
        _print(console, rows.SHARD_HEADINGS, [rows.shard_cells(shard) for shard in look.shards])
    if look.backfills:
        console.print()
        _print(console, rows.BACKFILL_HEADINGS, [rows.backfill_cells(backfill) for backfill in look.backfills])


def _print(console: Console, headings: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    """Print a table with its numbers at the right, as many columns as there is room for; the first is a name."""
    rows = list(cells)
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    shown = len(widths)
    while shown > 2 and sum(widths[:shown]) + GAP * (shown - 1) > console.width:
        shown -= 1
    table = Table(box=None, pad_edge=False)
    for column, heading in enumerate(headings[:shown]):
        table.add_column(heading, justify="left" if column == 0 or not heading else "right", overflow="fold")
    for row in rows:
        table.add_row(*row[:shown])
    console.print(table)
