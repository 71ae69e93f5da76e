"""Two runs side by side: the results of a release, and those of now."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.report import WIDE, number

ABOUT: Final = "ratios of the results in --out to those of a release"
RELEASED: Final = Path(__file__).parent / "released"
TOLERANCE: Final = 0.9
"""Below this a figure counts as worse: runs of one machine differ by a few percent."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of both runs."""

    bench: str
    name: str
    unit: str
    before: float
    now: float
    better: str

    @property
    def gain(self) -> float:
        """Above 1 where now is better."""
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


def run(released: Path, ours: Path) -> int:
    """Print the ratios; 1 where a figure is worse by more than a tenth."""
    pairs = [pair for path in sorted(released.glob("*.json")) for pair in _pairs(path, ours / path.name)]
    table = Table("bench", "figure", "released", "now", "unit", "gain", box=None)
    for pair in pairs:
        mark = "" if pair.gain >= TOLERANCE else "  WORSE"
        values = number(pair.before), number(pair.now), pair.unit, f"{pair.gain:.2f}{mark}"
        table.add_row(pair.bench, pair.name, *values)
    Console(width=None if Console().is_terminal else WIDE).print(table)
    return 1 if any(pair.gain < TOLERANCE for pair in pairs) else 0


def _pairs(released: Path, ours: Path) -> list[Pair]:
    if not ours.is_file():
        print(f"{ours}: not there; run `python -m bench {ours.stem}` first")
        return []
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (released, ours))
    for place in ("cpu", "cores", "gpus"):
        if old["machine"][place] != new["machine"][place]:
            print(f"{released.stem}: another machine: {place} {old['machine'][place]} and {new['machine'][place]}")
    return [
        Pair(released.stem, name, one["unit"], one["value"], new["headlines"][name]["value"], one["better"])
        for name, one in old["headlines"].items()
        if name in new["headlines"] and None not in (one["value"], new["headlines"][name]["value"])
    ]
