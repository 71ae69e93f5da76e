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
    """Print the ratios; return 1 if a figure is worse by more than a tenth."""
    pairs = [pair for path in sorted(released.glob("*.json")) for pair in _pairs(path, results / path.name)]
    table = Table("bench", "figure", "released", "now", "unit", "gain", box=None)
    for pair in pairs:
        mark = "" if pair.gain >= TOLERANCE else "  WORSE"
        values = number(pair.before), number(pair.now), pair.unit, f"{pair.gain:.2f}{mark}"
        table.add_row(pair.bench, pair.name, *values)
    Console(width=None if Console().is_terminal else DEFAULT_WIDTH).print(table)
    return 1 if any(pair.gain < TOLERANCE for pair in pairs) else 0


def _pairs(released: Path, results: Path) -> list[Pair]:
    if not results.is_file():
        print(f"{results}: not there; run `python -m bench {results.stem}` first")
        return []
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (released, results))
    for place in ("cpu", "cores", "gpus"):
        if old["machine"][place] != new["machine"][place]:
            print(f"{released.stem}: another machine: {place} {old['machine'][place]} and {new['machine'][place]}")
    return [
        Pair(released.stem, name, figure["unit"], figure["value"], new["headlines"][name]["value"], figure["better"])
        for name, figure in old["headlines"].items()
        if name in new["headlines"] and None not in (figure["value"], new["headlines"][name]["value"])
    ]
