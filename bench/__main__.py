"""`python -m bench NAME [--quick] [options]`: measure, print ratios, write NAME.json and NAME.png to bench/out."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Final, NoReturn

from bench import compare, machine
from bench.catalogue import BENCHES
from bench.report import show, write

OUT: Final = Path(__file__).parent / "out"
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the benchmark whose name is the first argument."""
    listed = "\n".join(f"  {bench.name:12} {bench.about}" for bench in BENCHES.values())
    about = f"{listed}\n  {'compare':12} {compare.ABOUT}\n\n`python -m bench NAME --help` shows a benchmark's options."
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, epilog=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*BENCHES, "compare"])
    if len(sys.argv) < 2:
        parser.print_help()
        return 2
    name = parser.parse_args(sys.argv[1:2]).name
    own = argparse.ArgumentParser(
        prog=f"bench {name}", description=compare.ABOUT if name == "compare" else BENCHES[name].about
    )
    own.add_argument("--out", type=Path, help=f"folder of the results; default {OUT}, with --quick {OUT}/quick")
    if name == "compare":
        compare.add_options(own)
        asked = own.parse_args(sys.argv[2:])
        return compare.run(asked.released, asked.out or OUT)
    own.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to measure")
    BENCHES[name].add_options(own)
    asked = own.parse_args(sys.argv[2:])
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    before = machine.describe()
    report = BENCHES[name].run(asked)
    show(report, before=before)
    folder = asked.out or (OUT / "quick" if asked.quick else OUT)
    write(report, folder, before=before)
    print(f"written to {folder}/{report.name}.json and .png{' (--quick: no measurement)' if asked.quick else ''}")
    return 0


def _interrupt(*_: object) -> NoReturn:
    """As on Ctrl-C: let all processes that were started end first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
