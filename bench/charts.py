"""Charts as plain values, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl

PANEL_INCHES: Final = (5.5, 3.6)
ACROSS: Final = 2


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one colour of bars: a value for each x or name."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel: bars over names, or lines over numbers."""

    title: str
    x: tuple[str, ...] | tuple[float, ...]
    series: tuple[Series, ...]
    unit: str
    x_unit: str = ""
    kind: Literal["bars", "lines"] = "bars"
    is_log: bool = False
    """Whether values, and the x of lines, are shown by their logarithm."""


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Draw the panels into one PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 after the choice of the backend

    down = max(1, -(-len(charts) // ACROSS))
    size = (PANEL_INCHES[0] * ACROSS, PANEL_INCHES[1] * down)
    figure, axes = plt.subplots(down, ACROSS, figsize=size, layout="constrained", squeeze=False)
    for chart, panel in zip(charts, axes.flat, strict=False):
        (_bars if chart.kind == "bars" else _lines)(chart, panel)
        panel.set_title(chart.title, fontsize=10)
    for panel in axes.flat[len(charts) :]:
        panel.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(chart: Chart, panel: Any) -> None:
    thick = 0.8 / max(1, len(chart.series))
    for number, series in enumerate(chart.series):
        at = [row + (number - (len(chart.series) - 1) / 2) * thick for row in range(len(chart.x))]
        panel.barh(at, series.values, height=thick, label=series.name)
    panel.set_yticks(range(len(chart.x)), [str(name) for name in chart.x])
    panel.invert_yaxis()
    panel.set_xlabel(chart.unit)
    shown = [value for series in chart.series for value in series.values if value > 0]
    if chart.is_log and shown:
        panel.set_xscale("log")
        # From a whole decade below the least: a bar that began just there would look like nothing beside the others.
        panel.set_xlim(left=10 ** (math.ceil(math.log10(min(shown))) - 1) / 2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
    if len(chart.series) > 1:
        panel.legend(fontsize=8)


def _lines(chart: Chart, panel: Any) -> None:
    for series in chart.series:
        panel.plot(chart.x[: len(series.values)], series.values, marker="o", markersize=3, label=series.name)
    panel.set_xlabel(chart.x_unit)
    panel.set_ylabel(chart.unit)
    if chart.is_log:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
