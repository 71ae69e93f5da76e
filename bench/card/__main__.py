"""`python -m bench.card STAGE [--tiny] [--wheels FOLDER]`: run a stage, write card-STAGE.json to $OUT or bench/out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.card import summary
from bench.card.plan import CALL_S, INSTALL_S, STAGES
from bench.card.runner import ROOT, adopt_descendants, install, run_stage


def main() -> int:
    """Run the stage; the exit code is 0 where each step passed or was skipped."""
    parser = argparse.ArgumentParser(prog="bench.card", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU: small models, few repetitions")
    parser.add_argument(
        "--only", metavar="STEP,…", help="some steps of the stage; one alone may take as long as the stage"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out steps that have passed in the folder of results"
    )
    parser.add_argument("--seconds", type=float, default=CALL_S, help="the stage ends before; default %(default)s")
    parser.add_argument("--wheels", type=Path, help="install these first, once, into build/card-site")
    parser.add_argument("--out", type=Path, help="folder of the results; default $OUT, or else bench/out")
    asked = parser.parse_args()
    began_s = time.monotonic()
    if asked.wheels:
        install(asked.wheels)
    adopt_descendants()
    steps = STAGES[asked.stage]
    if asked.only:
        names = asked.only.split(",")
        if unknown := set(names) - {step.name for step in steps}:
            parser.error(f"expected steps of {[step.name for step in steps]}, got {sorted(unknown)}")
        steps = tuple(step for step in steps if step.name in names)
        if len(steps) == 1:  # again, because its time was too short
            steps = (replace(steps[0], limit_s=int(asked.seconds)),)
    out = asked.out or Path(os.environ.get("OUT") or ROOT / "bench" / "out")
    stage_s = asked.seconds - INSTALL_S / 4 - (time.monotonic() - began_s)
    passed = run_stage(asked.stage, steps, tiny=asked.tiny, out=out, stage_s=stage_s, is_resumed=asked.resume)
    print(summary.as_text([out]))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
