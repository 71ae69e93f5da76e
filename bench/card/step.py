"""`python -m bench.card.step MODULE FOLDER [--tiny]`: run the measures of a module; figures.json has their results."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from bench.card.measure import Measures, run


def main() -> int:
    """Run the module that the command line names."""
    parser = argparse.ArgumentParser(prog="bench.card.step", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    measures: Callable[..., Measures] = importlib.import_module(asked.module).measures
    return 0 if run(measures(tiny=asked.tiny), asked.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
