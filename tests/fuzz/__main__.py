"""`make fuzz ARGS="decode --seconds 30"`: try to break a part with inputs made by chance, for so long."""

from __future__ import annotations

import argparse
import random
import time

from tests.fuzz.engine import run
from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz the targets that were named, or all; an input that breaks one is printed, and the exit code is not 0."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; default: all of them")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    asked = parser.parse_args()
    if unknown := set(asked.names) - TARGETS.keys():
        parser.error(f"expected targets of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    for name in asked.names or TARGETS:
        print(f"{name}: seed {asked.seed}", flush=True)
        began_s = time.monotonic()
        tried = run(TARGETS[name], seconds=asked.seconds, start=asked.seed)
        print(f"{name}: held for {tried} inputs in {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
