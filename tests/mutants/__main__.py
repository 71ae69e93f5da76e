"""`python -m tests.mutants`: put small faults into modules that hold promises, and count those that a test notices.

Each fault is one edit (`operators`) of one module (`modules`), and its tests run against a copy that has it. A fault
that no test notices is a test that is missing, or an edit that changes nothing (an equivalent one).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from tests.mutants.modules import TESTS
from tests.mutants.operators import Edit, edits_of, is_valid
from tests.mutants.zygote import ROOT, Zygote

OUT: Final = ROOT / "build" / "mutants"
LIMIT_S: Final = 300.0
"""For the tests of one fault; a single test has a minute."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault in one module."""

    module: str
    edit: Edit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said about one fault."""

    module: str
    line: int
    kind: str
    result: str
    """`caught`, `timed out`, `survived`; `unclear`: the test that failed also fails without the fault."""
    diff: str
    noticed_by: str
    seconds: float


def all_mutants(modules: Sequence[str]) -> list[Mutant]:
    """Every fault of these modules."""
    return [Mutant(module, edit) for module in modules for edit in edits_of((ROOT / module).read_text("utf-8"))]


def chosen(count: int, *, seed: int, modules: Sequence[str]) -> list[Mutant]:
    """A sample, the same for one seed and one source."""
    sources = {module: (ROOT / module).read_text(encoding="utf-8") for module in modules}
    mutants = all_mutants(modules)
    random.Random(seed).shuffle(mutants)
    valid = (mutant for mutant in mutants if is_valid(mutant.edit.apply(sources[mutant.module])))
    return list(itertools.islice(valid, count))


def tested(zygote: Zygote, mutant: Mutant) -> Outcome:
    """Run the tests of one fault."""
    source = (ROOT / mutant.module).read_text(encoding="utf-8")
    run = zygote.run(
        TESTS[mutant.module],
        limit_s=LIMIT_S,
        module=mutant.module,
        source=mutant.edit.apply(source),
    )
    result = "timed out" if run.exit_code is None else "survived" if run.exit_code == 0 else "caught"
    failed = failed_tests(run.log)
    return Outcome(
        mutant.module,
        mutant.edit.line,
        mutant.edit.kind,
        result,
        mutant.edit.diff(source),
        failed[0] if failed else f"exit code {run.exit_code}",
        round(run.seconds, 1),
    )


def failed_tests(log: str) -> list[str]:
    """The tests that pytest's summary names as failed, or the files that could not be collected."""
    words = [line.split(" - ")[0].partition(" ") for line in log.splitlines()]
    return [name for word, _, name in words if word in {"FAILED", "ERROR"}]


def work(mutants: Sequence[Mutant], *, until_s: float) -> Iterator[Outcome]:
    """Test these faults one after another until a time of the monotonic clock.

    At the end, the tests that failed run without a fault: a test that still fails has noticed nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        zygote = Zygote(Path(folder))
        outcomes = []
        for mutant in mutants:
            if time.monotonic() > until_s:
                break
            outcomes.append(tested(zygote, mutant))
            print_progress(outcomes[-1])
        named = {outcome.noticed_by for outcome in outcomes if "::" in outcome.noticed_by}
        run = zygote.run(sorted(named), limit_s=10 * LIMIT_S, is_first_only=False) if named else None
        failing = set(failed_tests(run.log)) if run is not None else set()
        for outcome in outcomes:
            yield replace(outcome, result="unclear") if outcome.noticed_by in failing else outcome


def side_by_side(arguments: Sequence[str], *, processes: int) -> Iterator[Outcome]:
    """The outcomes of several processes as they come; each is this command with a part of the sample."""
    command = [sys.executable, "-m", "tests.mutants", *arguments]
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for part in range(processes):
            # Without a buffer, so that no line waits in it when the selector is asked.
            process = subprocess.Popen(
                [*command, "--part", f"{part}/{processes}"], cwd=ROOT, stdout=subprocess.PIPE, bufsize=0
            )
            stack.enter_context(process)
            stack.callback(process.terminate)
            selector.register(process.stdout or sys.stdin, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                # One line is one short write, so a line that has begun is there at once.
                if line := key.fileobj.readline():  # type: ignore[union-attr]  # a stream, no number
                    yield Outcome(**json.loads(line))
                else:
                    selector.unregister(key.fileobj)


def print_part(mutants: Sequence[Mutant], part: str, *, until_s: float) -> None:
    """Test one part of a sample, and print each outcome as a line of JSON."""
    # So that servers which tests have started end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    number, count = map(int, part.split("/"))
    for outcome in work(mutants[number::count], until_s=until_s):
        print(json.dumps(asdict(outcome)), flush=True)


def print_progress(outcome: Outcome) -> None:
    """One line for each fault as it is tested, next to the outcomes of this process."""
    print(f"{outcome.result}: {outcome.module}:{outcome.line} {outcome.noticed_by}", file=sys.stderr, flush=True)


def report(outcomes: Sequence[Outcome], *, seed: int, at_least: float) -> int:
    """Print the figures and what survived; 1 where the share is too small."""
    counts = Counter(outcome.result for outcome in outcomes)
    noticed = counts["caught"] + counts["timed out"]
    share = noticed / len(outcomes) if outcomes else 0.0
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"seed-{seed}.json"
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1, ensure_ascii=False), "utf-8")
    for outcome in outcomes:
        if outcome.result == "survived":
            print(f"\n{outcome.module}:{outcome.line} ({outcome.kind}) survived\n{outcome.diff}")
    figures = ", ".join(f"{counts[result]} {result}" for result in ("caught", "timed out", "survived", "unclear"))
    print(f"\n{len(outcomes)} faults: {figures}; {share:.1%} noticed; seed {seed}; {path.relative_to(ROOT)}")
    return 0 if share >= at_least else 1


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="parts of paths, such as pipeline/ or lease_queue; default: all")
    parser.add_argument("--sample", type=int, default=150, help="how many faults; default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="repeats a sample; default: a new one")
    parser.add_argument("--processes", type=int, default=2, help="side by side; default: %(default)s")
    parser.add_argument("--at-least", type=float, default=0.85, help="the share below which it fails; %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="test what can be tested in this time")
    parser.add_argument("--list", action="store_true", help="print the faults of the sample, and run nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    modules = [path for path in TESTS if not args.modules or any(part in path for part in args.modules)]
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    mutants = chosen(args.sample, seed=seed, modules=modules)
    until_s = time.monotonic() + args.minutes * 60
    if args.part:
        print_part(mutants, args.part, until_s=until_s)
        return 0
    print(f"{len(mutants)} of {len(all_mutants(modules))} faults in {len(modules)} modules, seed {seed}", flush=True)
    if args.list:
        for mutant in mutants:
            source = (ROOT / mutant.module).read_text(encoding="utf-8")
            print(f"{mutant.module}:{mutant.edit.line} ({mutant.edit.kind})\n{mutant.edit.diff(source)}")
        return 0
    arguments = [*args.modules, "--sample", str(args.sample), "--seed", str(seed), "--minutes", str(args.minutes)]
    outcomes = list(side_by_side(arguments, processes=args.processes))
    if len(outcomes) < len(mutants):
        print(f"{len(mutants) - len(outcomes)} faults of the sample were not tested", file=sys.stderr)
        if not math.isfinite(args.minutes):
            return 2
    return report(outcomes, seed=seed, at_least=args.at_least)


if __name__ == "__main__":
    sys.exit(main())
