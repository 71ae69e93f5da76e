"""Images a second of workers that were started on a quiet machine, and on one that other programs kept busy.

Each round starts one of each; the programs that keep the machine busy end when their worker is ready. Both workers then
take turns of a few seconds from their first second of work on. The ratio of neighbouring turns shows how much the start
still matters after so many seconds of work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from tests.support.servers import Valkey

from bench import picture_setup, traffic
from bench.backlog import mean_batch
from bench.charts import Chart, Series
from bench.gpu import watching
from bench.picture_setup import PictureOptions, open_place, read_options
from bench.picture_systems import Place, Running, System
from bench.report import Headline, Report, Table, median, number, ratio
from bench.turns import Player, Ratio, Turn, paired, rate
from shiwu.contract import Lane
from shiwu_worker.runtime.cpus import usable_cores

QUIET: Final = "quiet start"
BUSY: Final = "busy start"
MAX_PER_S: Final = 1000.0
"""Images per second that no worker reaches here, so that the lane never runs empty."""
WITHIN_S: Final = 10.0
"""Seconds of work after which a busy start should not matter."""
BURN: Final = "while True: pass"


@dataclass(frozen=True, slots=True)
class Row:
    """All workers with one kind of start."""

    start: str
    ready_s: tuple[float, ...]
    """From the start of the process until it takes jobs, in each round."""
    start_cpu_s: tuple[float, ...]
    """CPU seconds of the worker's own process for it."""
    per_second: tuple[float, ...]
    """Images per second in each window, over all rounds."""
    own_cpu_s: float
    """CPU seconds per image in the worker's process, with the model."""
    mean_batch: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    rows: tuple[Row, ...]
    busy_is: tuple[Ratio, ...]
    """Busy start ÷ quiet start, in each window."""
    cpu_busy_is: float
    """CPU of the worker for an image, quiet start ÷ busy start: other work on the machine changes it by far less."""
    until_s: tuple[float, ...]
    """Seconds of work at the end of each window."""
    load: tuple[float, ...]
    """Load average over a minute, before each round."""


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    pictures: PictureOptions
    rounds: int
    turns: int
    burners: int


@dataclass(frozen=True, slots=True)
class _StartedWorker:
    """One worker, with its start and its turns."""

    player: Player
    ready_s: float
    start_cpu_s: float
    turns: list[Turn]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    picture_setup.add_options(parser, model="embedded")
    parser.add_argument("--rounds", type=int, help="each with a quiet and a busy start; default 4")
    parser.add_argument("--turns", type=int, help="of each worker, of --seconds; default 4")
    parser.add_argument("--burners", type=int, default=usable_cores(), help="programs that use a core; default: cores")


def run(asked: argparse.Namespace) -> Report:
    """Start the workers, let them take turns, and count."""
    turns, rounds = (asked.turns or (2 if asked.quick else 4)), (asked.rounds or (2 if asked.quick else 4))
    options = Options(read_options(asked, seconds=5.0), rounds, turns, asked.burners)
    workers: dict[str, list[_StartedWorker]] = {QUIET: [], BUSY: []}
    batches: dict[str, list[float]] = {QUIET: [], BUSY: []}
    load: list[float] = []
    with ExitStack() as stack:
        place = stack.enter_context(open_place(options.pictures, Lane.BULK))
        server = traffic.server_version(place.client)
        for round_ in range(rounds):
            load.append(os.getloadavg()[0])
            _play(options, place, workers, batches, round_)
            print(f"  round {round_ + 1} of {rounds}: {_line(workers)}", flush=True)
        figures = _figures(options, workers, batches, load)
        return _report(options, figures, place, server=server)


def _play(
    options: Options,
    place: Place,
    workers: dict[str, list[_StartedWorker]],
    batches: dict[str, list[float]],
    round_: int,
) -> None:
    """Run one round: both workers start, and then take turns; the order alternates."""
    system = options.pictures.systems[0]
    order = (QUIET, BUSY) if round_ % 2 == 0 else (BUSY, QUIET)
    with ExitStack() as stack:
        for kind in order:
            burners = options.burners if kind == BUSY else 0
            workers[kind].append(stack.enter_context(_started(place, system, f"{round_}-{kind}", burners=burners)))
        for turn in range(options.turns):
            for kind in order if turn % 2 == 0 else reversed(order):
                worker = workers[kind][-1]
                worker.turns.append(worker.player.turn(options.pictures.seconds))
        for kind in order:
            batches[kind].append(mean_batch(workers[kind][-1].player.replies()))


@contextmanager
def _started(place: Place, system: System, name: str, *, burners: int) -> Iterator[_StartedWorker]:
    """Start a worker with its own server, and stop it by SIGSTOP when it is ready."""
    folder = place.folder / name.replace(" ", "-")
    folder.mkdir()
    with (
        watching(folder, "gpu") as watch,
        Valkey(folder=folder / "valkey") as server,
        server.client(socket_timeout=60) as client,
    ):
        own = replace(place, url=server.url, client=client, folder=folder)
        with ExitStack() as stack:
            with _burning(burners):
                began_s = time.monotonic()
                running = stack.enter_context(system.open(own))
                ready_s = time.monotonic() - began_s
            start_cpu_s = _own_cpu_s(running)
            listener = stack.enter_context(traffic.listening(client))
            player = Player(own, running, listener, watch, per_second=MAX_PER_S)
            player.pause()
            try:
                yield _StartedWorker(player, ready_s, start_cpu_s, [])
            finally:
                player.resume()  # a stopped process cannot end


@contextmanager
def _burning(count: int) -> Iterator[None]:
    """Run `count` programs that each use a whole core."""
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait(10)


def _own_cpu_s(running: Running) -> float:
    return running.cpu_s()[0]


def _line(workers: dict[str, list[_StartedWorker]]) -> str:
    """Describe the last round."""
    parts = []
    for kind, started in workers.items():
        rates = ", ".join(number(rate([turn])) for turn in started[-1].turns)
        parts.append(f"{kind} ready {number(started[-1].ready_s)} s, pictures/s {rates}")
    return "; ".join(parts)


def _figures(
    options: Options, workers: dict[str, list[_StartedWorker]], batches: dict[str, list[float]], load: Sequence[float]
) -> Figures:
    windows = range(options.turns)
    rows = []
    for kind, started in workers.items():
        turns = [turn for worker in started for turn in worker.turns]
        rows.append(
            Row(
                start=kind,
                ready_s=tuple(worker.ready_s for worker in started),
                start_cpu_s=tuple(worker.start_cpu_s for worker in started),
                per_second=tuple(rate([worker.turns[window] for worker in started]) for window in windows),
                own_cpu_s=ratio(sum(turn.own_cpu_s for turn in turns), sum(turn.pictures for turn in turns)),
                mean_batch=median(batches[kind]),
            )
        )
    pairs = list(zip(workers[BUSY], workers[QUIET], strict=True))
    return Figures(
        rows=tuple(rows),
        busy_is=tuple(
            paired([([busy.turns[window]], [quiet.turns[window]]) for busy, quiet in pairs]) for window in windows
        ),
        cpu_busy_is=ratio(rows[0].own_cpu_s, rows[1].own_cpu_s),
        until_s=tuple(options.pictures.seconds * (window + 1) for window in windows),
        load=tuple(load),
    )


def _report(options: Options, figures: Figures, place: Place, *, server: str) -> Report:
    asked = options.pictures
    what = (
        f"{place.checkpoint.name}, {asked.size} JPEG from {asked.source}, {options.burners} programs during the start"
    )
    ends = [f"until {until_s:g} s" for until_s in figures.until_s]
    head = ("", "ready s", "CPU s of it", *ends, "own CPU ms/picture", "mean batch")
    rows = tuple(
        (
            row.start,
            number(median(row.ready_s)),
            number(median(row.start_cpu_s)),
            *(number(each) for each in row.per_second),
            number(row.own_cpu_s * 1000),
            number(row.mean_batch),
        )
        for row in figures.rows
    )
    ratios = ("busy ÷ quiet", "", "", *(str(busy) for busy in figures.busy_is), number(figures.cpu_busy_is), "")
    lines = tuple(Series(row.start, row.per_second) for row in figures.rows)
    return Report(
        name="start",
        headlines=tuple(_headlines(figures)),
        tables=(Table(f"Pictures/s by seconds of work: {what}", head, (*rows, ratios)),),
        charts=(Chart(what, figures.until_s, lines, "pictures/s", "seconds of work", kind="lines"),),
        figures=figures,
        settings=options,
        server=server,
        model=place.checkpoint.name,
        has_random_weights=place.checkpoint.is_random,
        notes=(f"load average before the rounds: {', '.join(number(value) for value in figures.load)}",),
    )


def _headlines(figures: Figures) -> Iterator[Headline]:
    quiet, busy = figures.rows
    for row in (quiet, busy):
        yield Headline(f"{row.start} to ready", median(row.ready_s), "s", "less")
    yield Headline("CPU of a start", median((*quiet.start_cpu_s, *busy.start_cpu_s)), "s", "less")
    within = max(place for place, until_s in enumerate(figures.until_s) if until_s <= WITHIN_S or place == 0)
    yield Headline(f"{BUSY} ÷ {QUIET}, within {WITHIN_S:g} s", figures.busy_is[within].value, "of quiet", "more")
    yield Headline(f"{BUSY} ÷ {QUIET}, pictures for a second of CPU", figures.cpu_busy_is, "of quiet", "more")
    yield Headline(f"{BUSY} ÷ {QUIET}, at the end", figures.busy_is[-1].value, "of quiet", "more")
