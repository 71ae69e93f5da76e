"""Charts as plain values, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl

CHART_INCHES: Final = (5.5, 3.6)
COLUMNS: Final = 2


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one colour of bars: a value for each x or name."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: bars over names, or lines over numbers."""

    title: str
    x: tuple[str, ...] | tuple[float, ...]
    series: tuple[Series, ...]
    unit: str
    x_unit: str = ""
    kind: Literal["bars", "lines"] = "bars"
    is_log: bool = False
    """Whether values, and the x of lines, have a logarithmic scale."""


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Draw all charts into one PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 after the choice of the backend

    down = max(1, -(-len(charts) // COLUMNS))
    size = (CHART_INCHES[0] * COLUMNS, CHART_INCHES[1] * down)
    figure, axes = plt.subplots(down, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for chart, axis in zip(charts, axes.flat, strict=False):
        (_bars if chart.kind == "bars" else _lines)(chart, axis)
        axis.set_title(chart.title, fontsize=10)
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(chart: Chart, axis: Any) -> None:
    thickness = 0.8 / max(1, len(chart.series))
    for number, series in enumerate(chart.series):
        at = [row + (number - (len(chart.series) - 1) / 2) * thickness for row in range(len(chart.x))]
        axis.barh(at, series.values, height=thickness, label=series.name)
    axis.set_yticks(range(len(chart.x)), [str(name) for name in chart.x])
    axis.invert_yaxis()
    axis.set_xlabel(chart.unit)
    shown = [value for series in chart.series for value in series.values if value > 0]
    if chart.is_log and shown:
        axis.set_xscale("log")
        # Starts a decade below the smallest value, whose bar would otherwise have no length.
        axis.set_xlim(left=10 ** (math.ceil(math.log10(min(shown))) - 1) / 2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    if len(chart.series) > 1:
        axis.legend(fontsize=8)


def _lines(chart: Chart, axis: Any) -> None:
    for series in chart.series:
        axis.plot(chart.x[: len(series.values)], series.values, marker="o", markersize=3, label=series.name)
    axis.set_xlabel(chart.x_unit)
    axis.set_ylabel(chart.unit)
    if chart.is_log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
