"""`python -m recipes.photo_zh build|evaluate|compare`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from recipes.packages import PackageError
from recipes.photo_zh.build import STEPS, build
from recipes.photo_zh.checkpoint import BUILT, PACKAGES, SAMPLES, SHIPPED
from recipes.photo_zh.compare import compare
from recipes.photo_zh.evaluate import evaluate


def main() -> None:
    """Run one command. Exit code 1: a package cannot be had, or the built model is not the shipped one."""
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
        print(evaluate(asked.model or SHIPPED, packages=asked.packages), end="")
        return 0
    folder = asked.model or BUILT
    if asked.command == "build":
        began = time.monotonic()
        build(folder, packages=asked.packages, steps=asked.steps)
        print(f"built {folder} in {time.monotonic() - began:.0f} s")
    found = compare(folder, SHIPPED, SAMPLES)
    print(found)
    return 0 if found.is_equal else 1


if __name__ == "__main__":
    main()
