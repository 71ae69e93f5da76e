"""`make protocol ARGS="--minutes 10"`: explore the protocol of the lanes, on a Valkey of its own."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.protocol.defects import DEFECTS
from tests.protocol.explorer import LENGTH, SMALL_ALPHABET, BrokenPromise, breadth_first, explore
from tests.protocol.simulated_redis import SimulatedRedis
from tests.support.servers import Valkey

PORTION_S = 30.0
"""After so many seconds the figures are printed."""


def main() -> None:
    """Run random schedules for so long, then breadth first; a broken promise is printed with its shortest schedule."""
    parser = argparse.ArgumentParser(prog="protocol", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="for random schedules; default: 2")
    parser.add_argument("--steps", type=int, default=LENGTH, help=f"of one schedule; default: {LENGTH}")
    parser.add_argument("--depth", type=int, default=0, help="also breadth first, up to so many steps")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument(
        "--defects", action="store_true", help="break each guard of the scripts and look for it instead"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Valkey(folder=Path(folder)) as server:
        if asked.defects:
            raise SystemExit(_look_for_defects(server, minutes=asked.minutes, seed=asked.seed))
        with SimulatedRedis.from_url(server.url, socket_timeout=30) as client:
            _explore(client, minutes=asked.minutes, seed=asked.seed, length=asked.steps)
            if asked.depth:
                totals = breadth_first(client, SMALL_ALPHABET, depth=asked.depth)
                print(f"breadth first: {totals.states} states within {asked.depth} steps", flush=True)


def _explore(client: SimulatedRedis, *, minutes: float, seed: int, length: int) -> None:
    end_s = time.monotonic() + minutes * 60
    schedules = steps = 0
    while (now_s := time.monotonic()) < end_s:
        totals = explore(client, seed=seed, until_s=min(end_s, now_s + PORTION_S), length=length)
        schedules, steps = schedules + totals.schedules, steps + totals.steps
        print(f"seed {seed}: {totals.schedules} schedules held; {schedules} with {steps} steps in all", flush=True)
        seed += 1


def _look_for_defects(server: Valkey, *, minutes: float, seed: int) -> int:
    """Look for each defect for so long; the number of those that were not found."""
    missed = 0
    for what, (script, old, new) in DEFECTS.items():
        with SimulatedRedis.from_url(server.url, socket_timeout=30) as client:
            client.changes = {script: (old, new)}
            began_s = time.monotonic()
            try:
                totals = explore(client, seed=seed, until_s=began_s + minutes * 60, is_shrinking=False)
            except BrokenPromise as error:
                [why, *_] = str(error).splitlines()
                print(f"found   {script}: {what} ({time.monotonic() - began_s:.1f} s: {why:.110})", flush=True)
            else:
                missed += 1
                print(f"MISSED  {script}: {what} ({totals.schedules} schedules)", flush=True)
    return missed


if __name__ == "__main__":
    main()
