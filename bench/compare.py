"""Compares the results of this machine with those of a release."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.report import DEFAULT_WIDTH, number

ABOUT: Final = "ratios of the results in --out to those of a release"
RELEASED: Final = Path(__file__).parent / "released"
TOLERANCE: Final = 0.9
"""Below this gain a figure counts as worse: runs of one machine differ by a few percent."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure in both runs."""

    bench: str
    name: str
    unit: str
    before: float
    now: float
    better: str

    @property
    def gain(self) -> float:
        """The improvement; above 1 where the new figure is better."""
        over, under = (self.now, self.before) if self.better == "more" else (self.before, self.now)
        return over / under if under else float("nan")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "released",
        type=Path,
        nargs="?",
        default=RELEASED,
        help="folder with a release's JSON files; default %(default)s",
    )


def run(released: Path, results: Path) -> int:
    """Print the ratios.

    Returns:
        0; 1 if a figure is worse by more than a tenth; 2 if there is nothing to compare, or results are missing or not
        comparable: not measured, without a released figure, or on a machine that other programs had loaded.
    """
    pairs: list[Pair] = []
    problems = [] if any(released.glob("*.json")) else [f"{released}: no results of a release"]
    for path in sorted(released.glob("*.json")):
        found, wrong = _pairs(path, results / path.name)
        pairs += found
        problems += wrong
    table = Table("bench", "figure", "released", "now", "unit", "gain", box=None)
    for pair in pairs:
        mark = "" if pair.gain >= TOLERANCE else "  WORSE"
        values = number(pair.before), number(pair.now), pair.unit, f"{pair.gain:.2f}{mark}"
        table.add_row(pair.bench, pair.name, *values)
    Console(width=None if Console().is_terminal else DEFAULT_WIDTH).print(table)
    for problem in problems:
        print(problem)
    if problems:
        return 2
    return 1 if any(not pair.gain >= TOLERANCE for pair in pairs) else 0


def _pairs(released: Path, results: Path) -> tuple[list[Pair], list[str]]:
    """The figures that both have, and what is missing in the new results or makes them useless."""
    if not results.is_file():
        name = results.stem.replace("messages-scale", "messages --scale")
        name = name.replace("messages-cluster", "messages --cluster 1,2,3,6")
        return [], [f"{results}: missing; run `python -m bench {name}` first"]
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (released, results))
    for place in ("cpu", "cores", "gpus"):
        if old["machine"][place] != new["machine"][place]:
            print(f"{released.stem}: another machine: {place} {old['machine'][place]} and {new['machine'][place]}")
    now = {name: figure["value"] for name, figure in new["headlines"].items() if figure["value"] is not None}
    released_figures = {name: figure for name, figure in old["headlines"].items() if figure["value"] is not None}
    problems = [f"{results}: no figure {name!r}" for name in released_figures if name not in now]
    if new["machine"].get("was_loaded"):
        problems.append(f"{results}: other programs had the machine (load {new['machine']['load_before']} before)")
    pairs = [
        Pair(released.stem, name, figure["unit"], figure["value"], now[name], figure["better"])
        for name, figure in released_figures.items()
        if name in now
    ]
    return pairs, problems
