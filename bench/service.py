"""Images a second of the whole service with a real model and real JPEGs, compared with the bare model and two peers.

They take turns of a few seconds: shiwu, the model alone in a loop, shiwu, the script that it replaces in a Celery task,
shiwu, and LitServe, a batching HTTP server fed by a Celery task. shiwu's ratio to each is that of neighbouring turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from bench import bare, litserve_sweep, picture_setup, traffic
from bench.backlog import StageTime, mean_batch
from bench.bare import Alone, Bare
from bench.charts import Chart, Series
from bench.gpu import Load
from bench.litserve_sweep import Tried
from bench.machine import describe
from bench.parity import Parity, compare
from bench.picture_setup import PictureOptions, open_place, read_options
from bench.picture_systems import SHIWU, Place, has_litserve
from bench.report import Headline, Report, Table, median, number, ratio
from bench.traffic import Reply
from bench.turns import Participant, Ratio, Turn, paired, rate, taking_part
from shiwu.contract import Lane

BARE: Final = "bare model"


@dataclass(frozen=True, slots=True)
class Row:
    """One system, all its turns."""

    system: str
    per_second: float
    all_per_second: tuple[float, ...]
    own_cpu_s: float
    """CPU seconds per image in its own processes: for shiwu the worker, with the model."""
    below_cpu_s: float
    """CPU seconds per image in the processes that these started: for shiwu the loaders."""
    mean_batch: float
    gpu: Load
    ready_s: float
    shiwu_is: Ratio
    """shiwu's rate ÷ this system's, from neighbouring turns."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    bare: Bare
    """All its turns combined."""
    all_bare_per_second: tuple[float, ...]
    shiwu_is: Ratio
    """shiwu's rate ÷ the rate of the bare model at its best batch size."""
    rows: tuple[Row, ...]
    stages: tuple[StageTime, ...]
    parity: Parity | None


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    pictures: PictureOptions
    rounds: int
    litserve_tried: tuple[Tried, ...] = ()
    """What the sweep of LitServe's settings measured, the best first; empty: no sweep."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    picture_setup.add_options(parser, model="vit-b-16")
    parser.add_argument(
        "--no-litserve-sweep", action="store_true", help="LitServe as the options say, instead of its best settings"
    )
    parser.add_argument("--rounds", type=int, help="in which each has a turn of --seconds; default 12")


def run(asked: argparse.Namespace) -> Report:
    """Start all systems, run all rounds, and count."""
    options = Options(read_options(asked, seconds=5.0), asked.rounds or (2 if asked.quick else 12))
    with ExitStack() as stack:
        place = stack.enter_context(open_place(options.pictures, Lane.BULK))
        shiwu = stack.enter_context(taking_part(place, options.pictures.systems[0]))
        alone = stack.enter_context(bare.opened(place.model_env, largest=shiwu.warm_up.largest_batch))
        dtype = alone.ask(options.pictures.seconds).dtype
        if dtype != shiwu.warm_up.dtype:
            raise RuntimeError(f"expected the model alone in {shiwu.warm_up.dtype} as in the service, got {dtype}")
        their_place = replace(place, dtype=dtype)
        if options.pictures.has_peers and has_litserve() and not (asked.quick or asked.no_litserve_sweep):
            options = _tune_litserve(options, their_place)
        peers = {
            system.name: stack.enter_context(taking_part(their_place, system))
            for system in options.pictures.systems[1:]
        }
        for warmed in (shiwu, *peers.values()):
            warmed.player.turn(options.pictures.seconds)  # not counted: fills every stage with jobs
        rounds = _Rounds(shiwu, alone, peers)
        for number_ in range(options.rounds):
            rounds.play(options.pictures.seconds)
            print(f"  round {number_ + 1} of {options.rounds}: {rounds.line()}", flush=True)
        rounds.finish(options.pictures.seconds)
        server = traffic.server_version(place.client)
        return _report(options, rounds.figures(place), place, server=server)


def _tune_litserve(options: Options, place: Place) -> Options:
    """The options with LitServe's best settings here."""
    pictures = options.pictures
    is_gpu = bool(describe().gpus)
    tried = litserve_sweep.tuned(place, pictures.litserve, seconds=pictures.seconds, is_gpu=is_gpu)
    return replace(options, pictures=replace(pictures, litserve=tried[0].settings), litserve_tried=tuple(tried))


class _Rounds:
    """The turns of all systems. shiwu has a turn before and after each other system."""

    def __init__(self, shiwu: Participant, alone: Alone, peers: Mapping[str, Participant]) -> None:
        self._shiwu = shiwu
        self._alone = alone
        self._peers = peers
        self._own: list[Turn] = []
        self._bare: list[Bare] = []
        self._theirs: dict[str, list[Turn]] = {name: [] for name in peers}

    def play(self, seconds: float) -> None:
        """Run one round."""
        self._own.append(self._shiwu.player.turn(seconds))
        self._bare.append(self._alone.ask(seconds))
        for name, peer in self._peers.items():
            self._own.append(self._shiwu.player.turn(seconds))
            self._theirs[name].append(peer.player.turn(seconds))

    def finish(self, seconds: float) -> None:
        """Run shiwu's turn after the last other system."""
        self._own.append(self._shiwu.player.turn(seconds))

    def line(self) -> str:
        """Describe the last round."""
        others = [f"{name} {number(rate(turns[-1:]))}" for name, turns in self._theirs.items()]
        own = number(rate(self._own[-1 - len(others) :]))
        return ", ".join([f"{SHIWU} {own} pictures/s", f"{BARE} {number(self._bare[-1].best.per_second)}", *others])

    def figures(self, place: Place) -> Figures:
        """Combine all rounds."""
        alone = bare.together(self._bare)
        best = [next(rate for rate in turn.rungs if rate.size == alone.best.size) for turn in self._bare]
        as_turns = [Turn(rate.per_second * rate.seconds, rate.seconds) for rate in best]
        replies = {SHIWU: self._shiwu.player.replies()}
        replies |= {name: peer.player.replies() for name, peer in self._peers.items()}
        rows = [_row(SHIWU, self._shiwu, self._own, replies[SHIWU], Ratio(1.0, 0.0))]
        for position, (name, peer) in enumerate(self._peers.items(), 1):
            rows.append(
                _row(name, peer, self._theirs[name], replies[name], self._ratio_to(self._theirs[name], position))
            )
        return Figures(
            bare=alone,
            all_bare_per_second=tuple(rate.per_second for rate in best),
            shiwu_is=self._ratio_to(as_turns, 0),
            rows=tuple(rows),
            stages=self._shiwu.warm_up.stages,  # in turns they would include the time in which the system was stopped
            parity=compare(place, replies),
        )

    def _ratio_to(self, theirs: Sequence[Turn], position: int) -> Ratio:
        """Compare shiwu's turns before and after each turn of another system; `position` is its position in a round."""
        each = 1 + len(self._peers)
        starts = [each * number_ + position for number_ in range(len(theirs))]
        return paired([(self._own[at : at + 2], [turn]) for at, turn in zip(starts, theirs, strict=True)])


def _row(name: str, participant: Participant, turns: Sequence[Turn], replies: Sequence[Reply], shiwu_is: Ratio) -> Row:
    pictures = sum(turn.pictures for turn in turns)
    return Row(
        system=name,
        per_second=rate(turns),
        all_per_second=tuple(rate([turn]) for turn in turns),
        own_cpu_s=ratio(sum(turn.own_cpu_s for turn in turns), pictures),
        below_cpu_s=ratio(sum(turn.below_cpu_s for turn in turns), pictures),
        mean_batch=mean_batch(replies),
        gpu=Load(median([turn.busy_percent for turn in turns]), participant.memory_mib),
        ready_s=participant.ready_s,
        shiwu_is=shiwu_is,
    )


def _report(options: Options, figures: Figures, place: Place, *, server: str) -> Report:
    asked = options.pictures
    device = f"{figures.bare.dtype} on {figures.bare.device}"
    what = f"{place.checkpoint.name}, {device}, {asked.size} JPEG from {asked.source}"
    names = (BARE, *(row.system for row in figures.rows))
    rates = (figures.bare.best.per_second, *(row.per_second for row in figures.rows))
    stages = tuple(stage.stage for stage in figures.stages)
    stage_ms = tuple(stage.mean_ms for stage in figures.stages)
    title = "Where a picture's time goes in shiwu, mean ms (claim and batch are waiting: for a loader, for the model)"
    return Report(
        name="service",
        headlines=tuple(_headlines(figures)),
        tables=(_table(figures, what), Table(title, stages, (tuple(number(each) for each in stage_ms),))),
        charts=(
            Chart(what, names, (Series("pictures/s", rates),), "pictures/s"),
            Chart("shiwu, a picture of a backlog", stages, (Series("ms", stage_ms),), "mean ms", is_log=True),
        ),
        figures=figures,
        settings=options,
        server=server,
        model=place.checkpoint.name,
        has_random_weights=place.checkpoint.is_random,
        notes=(*([figures.parity.text] if figures.parity else []), *picture_setup.notes(asked, place.source)),
    )


def _headlines(figures: Figures) -> Iterator[Headline]:
    shiwu, *peers = figures.rows
    yield Headline(BARE, figures.bare.best.per_second, "pictures/s", "more")
    yield Headline(f"{BARE}, start to warm", figures.bare.start_s, "s", "less")
    yield Headline("shiwu", shiwu.per_second, "pictures/s", "more")
    yield Headline("shiwu, start to ready", shiwu.ready_s, "s", "less")
    yield Headline(f"shiwu ÷ {BARE}", figures.shiwu_is.value, "of bare", "more")
    for peer in peers:
        yield Headline(f"shiwu ÷ {peer.system}", peer.shiwu_is.value, "times", "more")


def _table(figures: Figures, what: str) -> Table:
    head = ("system", "pictures/s", "least and most of a turn", "shiwu is", "own CPU ms/picture", "children's")
    best = figures.bare.best
    bare_row = (BARE, number(best.per_second), _range(figures.all_bare_per_second), str(figures.shiwu_is))
    rows = tuple(
        (
            row.system,
            number(row.per_second),
            _range(row.all_per_second),
            "–" if row.system == SHIWU else str(row.shiwu_is),
            number(row.own_cpu_s * 1000),
            number(row.below_cpu_s * 1000),
            number(row.mean_batch),
            number(row.ready_s),
            number(row.gpu.busy_percent),
            number(row.gpu.memory_mib),
        )
        for row in figures.rows
    )
    title = f"A backlog: {what}. Ratios are of neighbouring turns, ± their standard error"
    columns = (*head, "mean batch", "ready s", "GPU busy %", "GPU MiB")
    return Table(title, columns, ((*bare_row, "–", "–", str(best.size), "–", "–", "–"), *rows))


def _range(rates: Sequence[float]) -> str:
    return f"{number(min(rates))} to {number(max(rates))}"
