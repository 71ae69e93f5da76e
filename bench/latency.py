"""From enqueue to an answer that can be read: p50, p95 and p99 in an open loop, and one at a time on an idle worker.

The rates are shares of shiwu's capacity, measured again before each run because a machine's speed drifts. Each
peer gets the same rates as far as it can keep up with them, and a share of its own capacity.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from bench import bare, picture_setup, traffic
from bench.backlog import Drained, drain
from bench.bare import Bare
from bench.charts import Chart, Series
from bench.openloop import Idle, Spread, run_idle, run_open_loop
from bench.picture_setup import PictureOptions, open_place, read_options
from bench.picture_systems import SHIWU, Place, System
from bench.report import Headline, Report, Table, median, number, ratio
from shiwu.contract import Lane

COMPARED_SHARE: Final = 0.8
"""Share of its capacity at which a system's p99 is compared."""
KEEPS_UP: Final = 0.95
"""A peer gets no more than this share of its own capacity."""
MIN_IDLE_JOBS: Final = 20
CAPACITY_BACKLOG_S: Final = 6.0
"""Length of the backlog by which a capacity is measured again."""


@dataclass(frozen=True, slots=True)
class Run:
    """One system at one rate."""

    system: str
    share: float
    """Share of the capacity that `of` names."""
    of: str
    can: float
    """The system's own capacity just before the run."""
    spread: Spread


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one system can do, from backlogs."""

    system: str
    per_second: float
    """The median."""
    full_batch_ms: float
    """Forward pass of a full batch while loaders run."""
    beyond: tuple[float, ...]
    """Rates that were left out because the system cannot keep up with them."""
    idle: Idle


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    bare: Bare
    capacities: tuple[Capacity, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    pictures: PictureOptions
    shares: tuple[float, ...]
    fewest: int
    longest_s: float
    idle: int
    seed: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    picture_setup.add_options(parser, model="embedded")
    parser.add_argument("--loads", default="0.1,0.5,0.8,0.95", help="shares of shiwu's capacity; default %(default)s")
    parser.add_argument("--fewest", type=int, help="answers of one run, if --longest-s allows; default 1000")
    parser.add_argument("--longest-s", type=float, help="no run is longer; default 180")
    parser.add_argument("--idle", type=int, help="pictures one at a time; default 200")
    parser.add_argument("--seed", type=int, default=1)


def run(asked: argparse.Namespace) -> Report:
    """Measure each system on its own, shiwu first: its capacity gives the rates."""
    options = Options(
        pictures=read_options(asked, seconds=20.0),
        shares=tuple(float(part) for part in asked.loads.split(",")),
        fewest=asked.fewest or (50 if asked.quick else 1000),
        longest_s=asked.longest_s or (4.0 if asked.quick else 180.0),
        idle=asked.idle or (MIN_IDLE_JOBS if asked.quick else 200),
        seed=asked.seed,
    )
    capacities: list[Capacity] = []
    runs: list[Run] = []
    with open_place(options.pictures, Lane.INTERACTIVE) as place:
        shiwu, *peers = options.pictures.systems
        drained, capacity, its = _measure(place, shiwu, options, whole=None)
        alone = bare.measure(place.model_env, largest=drained.largest_batch, seconds=options.pictures.seconds)
        capacities.append(capacity)
        runs += its
        for system in peers:
            _, own, its = _measure(replace(place, dtype=alone.dtype), system, options, whole=capacity.per_second)
            capacities.append(own)
            runs += its
        server = traffic.server_version(place.client)
        return _report(options, Figures(alone, tuple(capacities), tuple(runs)), place, server=server)


def _measure(
    place: Place, system: System, options: Options, *, whole: float | None
) -> tuple[Drained, Capacity, list[Run]]:
    """Measure the capacity of one system, then each rate. `whole` is shiwu's capacity, None for shiwu itself."""
    with system.open(place) as running:
        drained = drain(place, running, seconds=options.pictures.seconds).drained
        print(f"  {system.name}: {number(drained.per_second)} pictures/s from a backlog", flush=True)
        idle = run_idle(place, running, count=options.idle, seed=options.seed)
        backlogs: list[Drained] = [drained]
        runs: list[Run] = []
        beyond: list[float] = []
        for share, of in _shares(options, is_peer=whole is not None):
            if runs:
                backlogs.append(drain(place, running, seconds=CAPACITY_BACKLOG_S).drained)
            can = backlogs[-1].per_second
            rate = share * (whole if whole is not None and of == SHIWU else can)
            if rate > KEEPS_UP * can * 1.0001:
                beyond.append(rate)
                continue
            seconds = min(options.longest_s, max(options.pictures.seconds, options.fewest / rate))
            spread = run_open_loop(place, running, rate=rate, seconds=seconds, seed=options.seed)
            print(f"  {system.name}: {number(rate)}/s of {number(can)}: p99 {number(spread.p99_ms)} ms", flush=True)
            runs.append(Run(system.name, share, of, can, spread))
    capacity = Capacity(
        system=system.name,
        per_second=median([backlog.per_second for backlog in backlogs]),
        full_batch_ms=median([backlog.full_batch_ms for backlog in backlogs]),
        beyond=tuple(beyond),
        idle=idle,
    )
    return drained, capacity, runs


def _shares(options: Options, *, is_peer: bool) -> Iterator[tuple[float, str]]:
    """Yield each share and whose capacity it refers to: shiwu's, and for a peer also COMPARED_SHARE of its own."""
    for share in options.shares:
        yield share, SHIWU
    if is_peer:
        yield COMPARED_SHARE, "own"


def _report(options: Options, figures: Figures, place: Place, *, server: str) -> Report:
    asked = options.pictures
    what = (
        f"{place.checkpoint.name}, {figures.bare.dtype} on {figures.bare.device}, {asked.size} JPEG from {asked.source}"
    )
    names = [capacity.system for capacity in figures.capacities]
    series = tuple(
        Series(
            name,
            tuple(
                measured.spread.p99_ms for measured in figures.runs if measured.system == name and measured.of == SHIWU
            ),
        )
        for name in names
    )
    loads = tuple(f"{share:.0%}" for share in options.shares)
    idle = figures.capacities[0].idle
    compared = _checked(figures, SHIWU)
    headlines = [Headline("idle, above the stages", idle.above_ms, "ms", "less")]
    if compared is not None:
        headlines.append(Headline("p99 at 80 %", compared.p99_ms, "ms", "less"))
        full_ms = figures.capacities[0].full_batch_ms
        headlines.append(Headline("p99 at 80 % ÷ full batch", ratio(compared.p99_ms, full_ms), "times", "less"))
        headlines += [
            Headline(f"p99 at 80 %, {name} ÷ shiwu", ratio(theirs.p99_ms, compared.p99_ms), "times", "more")
            for name in names[1:]
            if (theirs := _checked(figures, name)) is not None
        ]
    return Report(
        name="latency",
        headlines=tuple(headlines),
        tables=(_open_table(figures, what), _idle_table(figures)),
        charts=(
            Chart(f"p99, {what}", loads, _padded(series, len(loads)), "ms", is_log=True),
            Chart(
                "one at a time, idle worker, median",
                tuple(names),
                (Series("ms", tuple(capacity.idle.total_ms for capacity in figures.capacities)),),
                "ms",
            ),
        ),
        figures=figures,
        settings=options,
        server=server,
        model=place.checkpoint.name,
        has_random_weights=place.checkpoint.is_random,
        notes=(*_explained(figures, compared), *picture_setup.notes(asked, place.source)),
    )


def _explained(figures: Figures, compared: Spread | None) -> tuple[str, ...]:
    full = figures.bare.full
    lines = ["latency counts from the moment at which a job was to be sent; the first tenth of each run is not counted"]
    if compared is not None:
        full_ms = figures.capacities[0].full_batch_ms
        times = number(ratio(compared.p99_ms, full_ms))
        lines.append(
            f"shiwu's p99 at 80 % is {times} times what a full batch takes while loaders run ({number(full_ms)} ms); "
            f"the model alone, with all cores, takes {number(full.batch_ms)} ms for {full.size}"
        )
        slowest = ", ".join(f"{stage.stage} {number(stage.mean_ms)}" for stage in compared.slowest)
        lines.append(f"the slowest twentieth of shiwu's answers at 80 %, mean ms: {slowest}")
    for capacity in figures.capacities:
        if capacity.beyond:
            rates = ", ".join(number(rate) for rate in capacity.beyond)
            lines.append(
                f"{capacity.system} can't keep up with {rates}/s: "
                f"it does {number(capacity.per_second)}/s from a backlog"
            )
    return tuple(lines)


def _checked(figures: Figures, system: str) -> Spread | None:
    """Return the run at COMPARED_SHARE of the system's own capacity."""
    of = SHIWU if system == SHIWU else "own"
    found = [
        measured.spread
        for measured in figures.runs
        if (measured.system, measured.of, measured.share) == (system, of, COMPARED_SHARE)
    ]
    return found[0] if found else None


def _padded(series: tuple[Series, ...], length: int) -> tuple[Series, ...]:
    missing = float("nan")
    return tuple(Series(line.name, (*line.values, *[missing] * (length - len(line.values)))) for line in series)


def _open_table(figures: Figures, what: str) -> Table:
    rows = tuple(
        (
            f"{measured.system}, {measured.share:.0%} of {_whose(measured)}",
            number(measured.spread.rate),
            f"{measured.spread.answers:,}",
            number(measured.spread.p50_ms),
            number(measured.spread.p95_ms),
            number(measured.spread.p99_ms),
            number(measured.spread.sender_late_p99_ms),
            "yes" if measured.spread.kept_up else "NO",
        )
        for measured in figures.runs
    )
    head = ("system and load", "jobs/s", "answers", "p50 ms", "p95 ms", "p99 ms", "sender late, p99 ms", "kept up")
    return Table(f"Open loop, Poisson arrivals: {what}", head, rows)


def _whose(measured: Run) -> str:
    is_own = measured.of == "own" or measured.system == SHIWU
    return "its own" if is_own else "shiwu"


def _idle_table(figures: Figures) -> Table:
    rows = tuple(
        (
            capacity.system,
            number(capacity.idle.total_ms),
            number(capacity.idle.compute_ms) if capacity.idle.compute_ms else "–",
            number(capacity.idle.above_ms) if capacity.idle.compute_ms else "–",
            number(capacity.idle.above_p95_ms) if capacity.idle.compute_ms else "–",
            number(capacity.per_second),
        )
        for capacity in figures.capacities
    )
    head = ("system", "total ms", "stages ms", "above ms", "above, p95 ms", "capacity, pictures/s")
    return Table("One at a time on an idle worker, medians", head, rows)
