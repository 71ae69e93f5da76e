"""`python -m recipes.photo_zh build|evaluate|compare`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from recipes.packages import PackageError
from recipes.photo_zh.build import STEPS, build, label_set_yaml
from recipes.photo_zh.checkpoint import BUILT, LABEL_SET, PACKAGES, SAMPLES, SHIPPED
from recipes.photo_zh.compare import compare, lines_not_in_card
from recipes.photo_zh.evaluate import evaluate
from recipes.photo_zh.tables import read_vocabulary


def main() -> None:
    """Run one command.

    Exit code 1: a package cannot be had, the built model or its label set is not the shipped one, or the measured table
    is not the one in the folder's MODEL_CARD.md.
    """
    parser = argparse.ArgumentParser(prog="recipes.photo_zh", description=__doc__)
    parser.add_argument("command", nargs="?", default="build", choices=("build", "evaluate", "compare"))
    parser.add_argument("--model", type=Path, help="the folder to measure (shipped) or to build and compare (built)")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="keeps what is fetched")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the text tower's training")
    asked = parser.parse_args()
    # More threads would add sums in another order, and the built weights would differ in their last bits.
    torch.set_num_threads(1)
    try:
        sys.exit(_run(asked))
    except PackageError as error:
        sys.exit(str(error))


def _run(asked: argparse.Namespace) -> int:
    if asked.command == "evaluate":
        return _evaluate(asked.model or SHIPPED, packages=asked.packages)
    folder = asked.model or BUILT
    if asked.command == "build":
        began = time.monotonic()
        build(folder, packages=asked.packages, steps=asked.steps)
        folder.with_name(LABEL_SET.name).write_text(label_set_yaml(read_vocabulary()), encoding="utf-8")
        print(f"built {folder} in {time.monotonic() - began:.0f} s")
    found = compare(folder, SHIPPED, SAMPLES)
    print(found)
    return 0 if _is_shipped_label_set() and found.is_equal else 1


def _is_shipped_label_set() -> bool:
    """Say whether the label set of all words is the shipped one."""
    is_shipped = label_set_yaml(read_vocabulary()) == LABEL_SET.read_text(encoding="utf-8")
    print(f"label set {LABEL_SET.name}: {'the shipped one' if is_shipped else 'DIFFERENT'}")
    return is_shipped


def _evaluate(folder: Path, *, packages: Path) -> int:
    """Print the table, and whether it is the one in the folder's MODEL_CARD.md, if there is one."""
    table = evaluate(folder, packages=packages)
    print(table, end="")
    card = folder / "MODEL_CARD.md"
    if not card.is_file():
        return 0
    others = lines_not_in_card(table, card.read_text(encoding="utf-8"))
    print(f"{len(others)} lines are not in {card}:" if others else f"the same table as in {card}", *others, sep="\n")
    return 1 if others else 0


if __name__ == "__main__":
    main()
