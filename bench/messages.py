"""Jobs a second from claim to commit with a stand-in for the model: shiwu and its peers in turn, in one run.

All get the same messages, use the same Valkey, and answer in Celery's result format; every run's answers are counted
by id. `--scale` measures many workers on one Valkey instead: see `bench.scale`; `--cluster` the primaries of a cluster:
see `bench.cluster.scale`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from bench import scale, traffic, usage
from bench.charts import Chart, Series
from bench.cluster import scale as cluster_scale
from bench.message_systems import CAP, SHIWU, SLOTS, Cost, Spot, System, systems
from bench.report import Headline, Report, Table, median, number, ratio
from bench.workers import Answerer
from shiwu.contract import COUNTERS, Lane

RAMP: Final = 0.05
"""Share of the answers before the clock starts."""


@dataclass(frozen=True, slots=True)
class Drained:
    """One run over one backlog."""

    per_second: float
    worker_us: float
    """CPU of the worker and its children for one job."""
    server_us: float
    """CPU of the Valkey for one job."""


@dataclass(frozen=True, slots=True)
class Rate:
    """All runs of one system with one cost."""

    system: str
    versions: str
    settings: str
    cost: str
    jobs: int
    per_second: float
    all_per_second: tuple[float, ...]
    worker_us: float
    server_us: float
    shiwu_times: float
    """How many times as fast shiwu is, in this run."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    rates: tuple[Rate, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    rounds: int
    jobs: int
    peer_jobs: int
    costs: tuple[Cost, ...]
    slots: int = SLOTS
    cap: int = CAP


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rounds", type=int, help="of all systems in turn; the median counts; default 3")
    parser.add_argument("--jobs", type=int, help="for shiwu in each round; default 60,000")
    parser.add_argument("--peer-jobs", type=int, help="for each peer in each round; default 6,000")
    parser.add_argument(
        "--costs", default="0:0,0.1:2", help="a:b,… in ms of a stand-in model of a·n + b; default %(default)s"
    )
    scale.add_options(parser.add_argument_group("many workers on one Valkey"))
    cluster_scale.add_options(parser.add_argument_group("primaries of one cluster"))


def run(asked: argparse.Namespace) -> Report:
    """Measure every system with every cost, in turn."""
    if asked.scale:
        return scale.run(asked)
    if asked.cluster:
        return cluster_scale.run(asked)
    options = Options(
        quick=asked.quick,
        rounds=asked.rounds or (1 if asked.quick else 3),
        jobs=asked.jobs or (5000 if asked.quick else 60_000),
        peer_jobs=asked.peer_jobs or (600 if asked.quick else 6000),
        costs=tuple(Cost.read(text) for text in asked.costs.split(",")),
    )
    rates: list[Rate] = []
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client() as client,
    ):
        version = traffic.server_version(client)
        for cost in options.costs:
            rates += _compare(Spot(server.url, client, Path(name), server.pid, cost), options)
    return _report(options, rates, server=version)


def _compare(spot: Spot, options: Options) -> list[Rate]:
    compared = systems()
    found: dict[str, list[Drained]] = {system.name: [] for system in compared}
    for number_ in range(options.rounds):
        for system in compared:
            jobs = options.jobs if system.name == SHIWU else options.peer_jobs
            drained = _drain(spot, system, jobs)
            found[system.name].append(drained)
            print(f"  {spot.cost}, round {number_ + 1}: {system.name} {number(drained.per_second)} jobs/s", flush=True)
    shiwu = median([drained.per_second for drained in found[SHIWU]])
    return [_rate(spot.cost, system, found[system.name], options, shiwu=shiwu) for system in compared]


def _rate(cost: Cost, system: System, runs: Sequence[Drained], options: Options, *, shiwu: float) -> Rate:
    per_second = median([drained.per_second for drained in runs])
    return Rate(
        system=system.name,
        versions=system.versions,
        settings=system.settings,
        cost=str(cost),
        jobs=options.jobs if system.name == SHIWU else options.peer_jobs,
        per_second=per_second,
        all_per_second=tuple(drained.per_second for drained in runs),
        worker_us=median([drained.worker_us for drained in runs]),
        server_us=median([drained.server_us for drained in runs]),
        shiwu_times=ratio(shiwu, per_second),
    )


def _drain(spot: Spot, system: System, jobs: int) -> Drained:
    """Answer one backlog; measure from a twentieth of the answers to the last."""
    spot.client.flushall()
    messages = traffic.build(["s3://pictures/cat.jpg"], count=jobs, prefix="job", lane=Lane.BULK)
    traffic.send(spot.client, Lane.BULK, messages)

    def answered() -> int:
        if system.name == SHIWU:
            return int(spot.client.hget(COUNTERS, "answered") or 0)
        return int(spot.client.dbsize())  # one key per answer, and a few others, too few to matter

    with system.open(spot) as worker:

        def has(count: float) -> bool:
            worker.check()
            return answered() >= count

        wait_until(lambda: has(jobs * RAMP), timeout_s=60, every_s=0.005, what="answers")
        first, began_s, before = answered(), time.monotonic(), _cpu(spot, worker)
        wait_until(lambda: has(jobs), timeout_s=300, every_s=0.01, what=f"{jobs} answers")
        took_s, after = time.monotonic() - began_s, _cpu(spot, worker)
        ids = [message.id for message in messages]
        wait_until(lambda: not traffic.missing(spot.client, ids), timeout_s=10, what=f"{jobs} answers by id")
    traffic.read(spot.client, ids[:: max(1, jobs // 100)])
    counted = jobs - first
    worker_us, server_us = ((end - start) / counted * 1e6 for start, end in zip(before, after, strict=True))
    return Drained(counted / took_s, worker_us, server_us)


def _cpu(spot: Spot, worker: Answerer) -> tuple[float, float]:
    return usage.cpu_s(usage.families([worker.pid])), usage.cpu_s([spot.server_pid])


def _report(options: Options, rates: Sequence[Rate], *, server: str) -> Report:
    rows = tuple(
        (
            f"{rate.system}, {rate.cost}",
            number(rate.per_second),
            " ".join(number(each) for each in rate.all_per_second),
            number(rate.worker_us),
            number(rate.server_us),
            f"{rate.shiwu_times:.1f}",
        )
        for rate in rates
    )
    names = tuple(dict.fromkeys(rate.system for rate in rates))
    series = tuple(
        Series(str(cost), tuple(rate.per_second for rate in rates if rate.cost == str(cost))) for cost in options.costs
    )
    headlines = [
        Headline(
            f"{rate.system}, {rate.cost}" if rate.system == SHIWU else f"shiwu ÷ {rate.system}, {rate.cost}",
            rate.per_second if rate.system == SHIWU else rate.shiwu_times,
            "jobs/s" if rate.system == SHIWU else "times",
            "more",
        )
        for rate in rates
    ]
    head = ("system, stand-in model", "jobs/s", "all rounds", "worker µs/job", "Valkey µs/job", "shiwu is × as fast")
    settings = {rate.system: f"{rate.system} ({rate.versions}): {rate.settings}" for rate in rates}
    return Report(
        name="messages",
        headlines=tuple(headlines),
        tables=(Table("Claim to commit, one worker process (prefork: one a core)", head, rows),),
        charts=(Chart("claim to commit, stand-in for the model", names, series, "jobs/s", is_log=True),),
        figures=Figures(tuple(rates)),
        settings=options,
        server=server,
        notes=(f"{server}; every answer was counted by id", *settings.values()),
    )
