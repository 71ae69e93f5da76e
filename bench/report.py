"""The report of a benchmark: tables and charts for people, figures as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.table import Table as RichTable

from bench import machine
from bench.charts import Chart, draw

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


DEFAULT_WIDTH: Final = 160
"""Width in characters where the output is no terminal."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure by which releases are compared; see `bench.compare`."""

    name: str
    value: float
    unit: str
    better: Literal["more", "less"]


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `figures` and `settings` are dataclasses, and become the JSON file."""

    name: str
    headlines: tuple[Headline, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    figures: DataclassInstance
    settings: DataclassInstance
    server: str = ""
    """Version of the Redis-compatible server that took part."""
    model: str = ""
    has_random_weights: bool = False
    notes: tuple[str, ...] = ()


def median(values: Sequence[float]) -> float:
    """Return the median, or NaN if there are no values."""
    return statistics.median(values) if values else float("nan")


def ratio(over: float, under: float) -> float:
    """Return the quotient, or NaN if the divisor is 0."""
    return over / under if under else float("nan")


def number(value: float, digits: int = 3) -> str:
    """Return a number with `digits` significant digits: 15,321, 9.84, 0.0312."""
    if value != value:  # noqa: PLR0124 NaN: there was nothing to measure
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def loaded_note(before: machine.Machine) -> tuple[str, ...]:
    """A note for a run on a machine that other programs used, or none."""
    if not before.was_loaded:
        return ()
    return (f"NOT A MEASUREMENT: load {before.load_before} on {before.cores} cores before the run, by other programs.",)


def show(report: Report, *, before: machine.Machine, console: Console | None = None) -> None:
    """Print the tables and the notes on them."""
    out = console or Console(width=None if Console().is_terminal else DEFAULT_WIDTH)
    for table in report.tables:
        grid = RichTable(*table.head, title=table.title, title_justify="left", title_style="bold", box=None)
        for column in grid.columns[1:]:
            column.justify = "right"
        for row in table.rows:
            grid.add_row(*row)
        out.print(grid, "")
    for note in (*loaded_note(before), *report.notes, *_weights(report)):
        out.print(f"• {note}", markup=False, highlight=False)
    gpus = ", ".join(before.gpus) or "no GPU"
    out.print(f"• {before.cpu}, {before.cores} cores, {', '.join(before.flags)}; {gpus}", markup=False, highlight=False)


def _weights(report: Report) -> tuple[str, ...]:
    if not report.has_random_weights:
        return ()
    return (f"{report.model}: RANDOM weights in the published shape. Speed is real, the tags mean nothing.",)


def write(report: Report, folder: Path, *, before: machine.Machine) -> None:
    """Write NAME.json and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": report.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "headlines": {headline.name: _plain(headline) for headline in report.headlines},
        "figures": _plain(report.figures),
        "settings": _plain(report.settings),
        "machine": _plain(before),
        "versions": dict(machine.versions()) | ({"server": report.server} if report.server else {}),
        "model": report.model,
        "random_weights": report.has_random_weights,
        "notes": [*loaded_note(before), *report.notes],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    (folder / f"{report.name}.json").write_text(text + "\n", encoding="utf-8")
    draw(report.charts, folder / f"{report.name}.png")


def _plain(value: Any) -> Any:
    """Turn dataclasses into JSON values: numbers with six digits, null for NaN."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
