"""Pictures a second of the whole service with a real model and real JPEGs, beside the bare model and two peers.

In turn, on one machine: the model alone in a loop; shiwu; the script that it replaces, in a Celery task; and LitServe,
a batching HTTP server, fed by a Celery task.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench import bare, picture_setup, traffic
from bench.backlog import Drained, StageTime, drain, median_rate, middle
from bench.bare import Bare
from bench.charts import Chart, Series
from bench.gpu import Load
from bench.picture_setup import PictureOptions, open_place, read_options
from bench.picture_systems import REFERENCE, SHIWU, Place, System
from bench.report import Headline, Report, Table, median, number, ratio
from bench.traffic import Reply
from shiwu.contract import Lane


@dataclass(frozen=True, slots=True)
class Run:
    """One system, one round."""

    drained: Drained
    ready_s: float
    """From the start of its processes until they take jobs."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system, all its rounds."""

    system: str
    per_second: float
    all_per_second: tuple[float, ...]
    own_cpu_s: float
    below_cpu_s: float
    mean_batch: float
    gpu: Load
    ready_s: float
    of_bare: float
    reference_times: float
    """How many times as many pictures a second as the reference script."""


@dataclass(frozen=True, slots=True)
class Parity:
    """shiwu's answers beside the reference script's, picture by picture."""

    pictures: int
    same_order: int
    max_score_difference: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    bare: Bare
    """Of the round with the median rate."""
    bare_per_second: float
    all_bare_per_second: tuple[float, ...]
    rows: tuple[Row, ...]
    stages: tuple[StageTime, ...]
    parity: Parity | None


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    pictures: PictureOptions
    rounds: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    picture_setup.add_options(parser, model="vit-b-16")
    parser.add_argument("--rounds", type=int, help="of all in turn; the median counts; default 3")


def run(asked: argparse.Namespace) -> Report:
    """Measure everything in turn."""
    options = Options(read_options(asked, seconds=20.0), asked.rounds or (1 if asked.quick else 3))
    bares: list[Bare] = []
    runs: dict[str, list[Run]] = {system.name: [] for system in options.pictures.systems}
    replies: dict[str, Sequence[Reply]] = {}
    with open_place(options.pictures, Lane.BULK) as place:
        for _ in range(options.rounds):
            here = place
            for system in options.pictures.systems:
                run, replies[system.name] = _measure(here, system, options.pictures.seconds)
                runs[system.name].append(run)
                if system.name == SHIWU:
                    bares.append(_alone(place, run.drained, options.pictures.seconds))
                    here = replace(place, dtype=bares[-1].dtype)
        server = traffic.server_version(place.client)
        figures = _figures(bares, runs, _parity(place, replies))
        return _report(options, figures, place, server=server)


def _measure(place: Place, system: System, seconds: float) -> tuple[Run, Sequence[Reply]]:
    began_s = time.monotonic()
    with system.open(place) as running:
        ready_s = time.monotonic() - began_s
        backlog = drain(place, running, seconds=seconds)
    print(f"  {system.name}: {number(backlog.drained.per_second)} pictures/s", flush=True)
    return Run(backlog.drained, ready_s), backlog.replies


def _alone(place: Place, shiwu: Drained, seconds: float) -> Bare:
    """The bare model at the batch sizes that shiwu has just used."""
    found = bare.measure(place.model_env, largest=shiwu.largest_batch, seconds=seconds)
    if found.dtype != shiwu.dtype:
        raise RuntimeError(f"expected the model alone in {shiwu.dtype} as in the service, got {found.dtype}")
    print(f"  bare model: {number(found.best.per_second)} pictures/s, {found.dtype}", flush=True)
    return found


def _figures(bares: Sequence[Bare], runs: Mapping[str, Sequence[Run]], parity: Parity | None) -> Figures:
    rates = tuple(one.best.per_second for one in bares)
    bare_rate = median(rates)
    drained = {name: [one.drained for one in its] for name, its in runs.items()}
    reference = median_rate(drained.get(REFERENCE, []))
    rows = []
    for name, its in drained.items():
        mid, rate = middle(its), median_rate(its)
        rows.append(
            Row(
                system=name,
                per_second=rate,
                all_per_second=tuple(one.per_second for one in its),
                own_cpu_s=mid.own_cpu_s,
                below_cpu_s=mid.below_cpu_s,
                mean_batch=mid.mean_batch,
                gpu=mid.gpu,
                ready_s=median([one.ready_s for one in runs[name]]),
                of_bare=ratio(rate, bare_rate),
                reference_times=ratio(rate, reference),
            )
        )
    middle_bare = sorted(bares, key=lambda one: one.best.per_second)[(len(bares) - 1) // 2]
    return Figures(middle_bare, bare_rate, rates, tuple(rows), middle(drained[SHIWU]).stages, parity)


def _parity(place: Place, replies: Mapping[str, Sequence[Reply]]) -> Parity | None:
    """Both have been asked for the same pictures in the same turn."""
    if REFERENCE not in replies:
        return None
    different = len(place.source.references)
    pairs = list(zip(replies[SHIWU][:different], replies[REFERENCE][:different], strict=False))
    differences = []
    for ours, theirs in pairs:
        scores = dict(theirs.tags)
        differences += [abs(score - scores[label]) for label, score in ours.tags if label in scores]
    same = sum([label for label, _ in a.tags] == [label for label, _ in b.tags] for a, b in pairs)
    return Parity(len(pairs), same, max(differences))


def _report(options: Options, figures: Figures, place: Place, *, server: str) -> Report:
    asked = options.pictures
    device = f"{figures.bare.dtype} on {figures.bare.device}"
    what = f"{place.checkpoint.name}, {device}, {asked.size} JPEG from {asked.source}"
    names = ("bare model", *(one.system for one in figures.rows))
    rates = (figures.bare_per_second, *(one.per_second for one in figures.rows))
    stages = tuple(one.stage for one in figures.stages)
    stage_ms = tuple(one.mean_ms for one in figures.stages)
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
        notes=(*_parity_note(figures.parity), *picture_setup.notes(asked, place.source)),
    )


def _headlines(figures: Figures) -> Iterator[Headline]:
    shiwu, *peers = figures.rows
    yield Headline("bare model", figures.bare_per_second, "pictures/s", "more")
    yield Headline("bare model, start to warm", figures.bare.start_s, "s", "less")
    yield Headline("shiwu", shiwu.per_second, "pictures/s", "more")
    yield Headline("shiwu, start to ready", shiwu.ready_s, "s", "less")
    yield Headline("shiwu ÷ bare model", shiwu.of_bare, "of bare", "more")
    for one in peers:
        yield Headline(f"shiwu ÷ {one.system}", ratio(shiwu.per_second, one.per_second), "times", "more")


def _parity_note(parity: Parity | None) -> tuple[str, ...]:
    if parity is None:
        return ()
    return (
        f"answers against the reference script's: {parity.same_order} of {parity.pictures} in the same order, "
        f"scores {parity.max_score_difference:.4f} apart at most",
    )


def _table(figures: Figures, what: str) -> Table:
    head = ("system", "pictures/s", "all rounds", "÷ bare", "× reference", "own CPU ms/picture", "children's")
    best = figures.bare.best
    rounds = " ".join(number(each) for each in figures.all_bare_per_second)
    alone = ("bare model", number(figures.bare_per_second), rounds, "1", "–", "–", "–", str(best.size), "–", "–", "–")
    rows = tuple(
        (
            one.system,
            number(one.per_second),
            " ".join(number(each) for each in one.all_per_second),
            f"{one.of_bare:.3f}",
            number(one.reference_times),
            number(one.own_cpu_s * 1000),
            number(one.below_cpu_s * 1000),
            number(one.mean_batch),
            number(one.ready_s),
            number(one.gpu.busy_percent),
            number(one.gpu.memory_mib),
        )
        for one in figures.rows
    )
    return Table(f"A backlog: {what}", (*head, "mean batch", "ready s", "GPU busy %", "GPU MiB"), (alone, *rows))
