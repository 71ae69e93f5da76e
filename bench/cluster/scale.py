"""Primaries of one cluster, each held to the same small share of a core: how the rate grows with their number.

A machine of two cores then has several primaries that are the limit, as several machines would have. Each primary has
the same number of shards at any point, and the workers hold the same number of jobs for each primary. So a primary gets
portions of the same size, whose cost is shared by their jobs, and only the number of primaries differs.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

from bench import traffic, usage
from bench.charts import Chart, Series
from bench.cluster.quota import NoQuota, Quota, open_quota
from bench.report import Headline, Report, Table, median, number, ratio
from bench.workers import StandInWorker
from shiwu.broker.sharding import PoolOptions, ShardRedis, by_shard, open_shards
from shiwu.contract import COUNTERS, Lane

SHARDS: Final = 2
"""Of each primary."""
WORKERS: Final = 2
NODE_SHARE: Final = 0.06
LEAST_US: Final = 35.0
"""CPU of a node for one job at least: from it follows how many jobs a run needs."""
SLOTS: Final = 160
"""Jobs that a worker holds for each primary."""
CAP: Final = 64
RAMP: Final = 2
"""Answers before the clock starts ÷ slots of all workers: the first claims fill these."""
MARGIN_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    primaries: tuple[int, ...]
    rounds: int
    window_s: float
    node_share: float
    shards_of_each: int = SHARDS
    workers: int = WORKERS
    slots: int = SLOTS
    cap: int = CAP

    def ramp_jobs(self, primaries: int) -> int:
        """Answers before the clock starts."""
        return RAMP * self.workers * self.slots * primaries


@dataclass(frozen=True, slots=True)
class Run:
    """One number of primaries in one round."""

    per_second: float
    node_us: float
    """CPU of all primaries together for one job."""
    worker_us: float
    """CPU of all workers for one job."""
    node_share: float
    """The share of a core that a primary used, on average."""


@dataclass(frozen=True, slots=True)
class Point:
    """All rounds of one number of primaries; the medians."""

    primaries: int
    per_second: float
    of_linear: float
    """Median over the rounds of rate ÷ (primaries × the rate of one primary in the same round)."""
    all_of_linear: tuple[float, ...]
    node_us: float
    worker_us: float
    node_share: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    points: tuple[Point, ...]


def add_options(parser: argparse._ArgumentGroup) -> None:
    """Its own options."""
    parser.add_argument("--cluster", help="measure this instead, for these numbers of primaries, as 1,2,3,6")
    parser.add_argument(
        "--node-share", type=float, default=NODE_SHARE, help="of a core for each primary; default %(default)s"
    )


def run(asked: argparse.Namespace) -> Report:
    """Measure all numbers of primaries in turn, round after round.

    Raises:
        SystemExit: CPU time cannot be limited here.
    """
    options = Options(
        quick=asked.quick,
        primaries=tuple(int(part) for part in asked.cluster.split(",")),
        rounds=asked.rounds or (1 if asked.quick else 5),
        window_s=asked.window_s or (1.5 if asked.quick else 4.0),
        node_share=asked.node_share,
    )
    rounds: list[dict[int, Run]] = []
    version = ""
    try:
        for round_number in range(options.rounds):
            rounds.append({})
            for count in options.primaries:
                rounds[-1][count], version = _measure(count, options)
                rate, node_us = rounds[-1][count].per_second, rounds[-1][count].node_us
                print(
                    f"  round {round_number + 1}, {count} primaries: {number(rate)} jobs/s, {node_us:.0f} µs",
                    flush=True,
                )
    except NoQuota as error:
        raise SystemExit(f"messages --cluster skipped: {error}") from None
    return _report(options, [_point(count, rounds) for count in options.primaries], server=version)


def _measure(primaries: int, options: Options) -> tuple[Run, str]:
    """One run, and the version of the server."""
    shards = primaries * options.shards_of_each
    per_node_s = options.node_share / LEAST_US * 1e6
    jobs = int(4 * options.ramp_jobs(primaries) + primaries * per_node_s * (options.window_s + MARGIN_S))
    messages = traffic.build(["s3://pictures/cat.jpg"], count=jobs, prefix="job", lane=Lane.BULK)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shiwu-bench-")))
        quotas = [stack.enter_context(open_quota()) for _ in range(primaries)]
        cluster = stack.enter_context(ValkeyCluster(folder=folder, primaries=primaries, shards=shards))
        for quota, port in zip(quotas, cluster.ports, strict=True):
            quota.add(cluster.server(port).pid)
        url = cluster.url(shards=shards)
        clients = open_shards(url, PoolOptions(timeout_s=60.0))
        for client in clients:
            stack.enter_context(client)
        workers = [stack.enter_context(_worker(url, folder, options, primaries, n)) for n in range(options.workers)]
        for worker in workers:
            worker.wait_ready().signal(signal.SIGSTOP)
        groups = by_shard(messages, shards=shards, id_of=lambda message: message.id)
        for shard, group in groups.items():
            traffic.send(clients[shard], Lane.BULK, group)
        nodes = [stack.enter_context(_open_node(cluster, port, clients)) for port in cluster.ports]
        _limit(quotas, options.node_share)
        for worker in workers:
            worker.signal(signal.SIGCONT)
        found = _watch(nodes, workers, options)
        _limit(quotas, None)
        wait_until(lambda: _answered(clients) >= jobs, timeout_s=180, every_s=0.05, what=f"{jobs} answers")
        left = sum(traffic.missing(clients[shard], [each.id for each in group]) for shard, group in groups.items())
        if left:
            raise RuntimeError(f"{left} of {jobs} jobs have no answer")
        return found, traffic.server_version(clients[0])


def _worker(url: str, folder: Path, options: Options, primaries: int, number_: int) -> StandInWorker:
    slots = options.slots * primaries
    return StandInWorker(
        redis_url=url, name=f"worker{number_}", folder=folder, slots=slots, cap=options.cap, cost=(0.0, 0.0)
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """A primary at one moment of the monotonic clock."""

    at_s: float
    answered: int
    cpu_s: float
    shortest: int
    """Messages in the shortest lane of its shards."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A primary and the prefixes of its shards."""

    pid: int
    client: redis.Redis
    prefixes: tuple[str, ...]

    def read(self) -> _Reading:
        """Read its counters. A node at its limit replies late."""
        with self.client.pipeline(transaction=False) as pipe:
            for prefix in self.prefixes:
                pipe.hget(f"{prefix}{COUNTERS}", "answered")
                pipe.llen(f"{prefix}{Lane.BULK.queue}")
            found = [int(reply or 0) for reply in pipe.execute()]
        return _Reading(time.monotonic(), sum(found[::2]), usage.cpu_s([self.pid]), min(found[1::2]))


@contextmanager
def _open_node(cluster: ValkeyCluster, port: int, clients: Sequence[ShardRedis]) -> Iterator[_Node]:
    shards = [each.shard for each in clients if cluster.owner(each.shard.slot or 0) == port]
    server = cluster.server(port)
    with server.client(socket_timeout=60.0) as client:
        yield _Node(server.pid, client, tuple(shard.prefix for shard in shards))


def _watch(nodes: Sequence[_Node], workers: Sequence[StandInWorker], options: Options) -> Run:
    """Watch a window in which all work. Each node is read by its own clock, and the rates are added up."""
    worker_pids = [worker.pid for worker in workers]
    ramp_jobs = options.ramp_jobs(len(nodes))

    def is_steady() -> bool:
        return sum(node.read().answered for node in nodes) >= ramp_jobs

    wait_until(is_steady, timeout_s=120, every_s=0.1, what=f"the first {ramp_jobs} answers")
    workers_s = usage.cpu_s(worker_pids)
    with ThreadPoolExecutor(len(nodes)) as pool:
        before = list(pool.map(_Node.read, nodes))
        _wait_moment(time.monotonic() + options.window_s)
        after = list(pool.map(_Node.read, nodes))
    workers_s = usage.cpu_s(worker_pids) - workers_s
    for worker in workers:
        worker.check()
    if not all(reading.shortest for reading in after):
        raise RuntimeError("the backlog was too short: a shard had no messages any more")
    pairs = list(zip(before, after, strict=True))
    answered = sum(end.answered - begin.answered for begin, end in pairs)
    nodes_s = sum(end.cpu_s - begin.cpu_s for begin, end in pairs)
    return Run(
        per_second=sum((end.answered - begin.answered) / (end.at_s - begin.at_s) for begin, end in pairs),
        node_us=ratio(nodes_s, answered) * 1e6,
        worker_us=ratio(workers_s, answered) * 1e6,
        node_share=median([(end.cpu_s - begin.cpu_s) / (end.at_s - begin.at_s) for begin, end in pairs]),
    )


def _limit(quotas: Sequence[Quota], share: float | None) -> None:
    for quota in quotas:
        quota.limit(share)


def _answered(clients: Sequence[ShardRedis]) -> int:
    return sum(int(client.hget(COUNTERS, "answered") or 0) for client in clients)


def _wait_moment(until_s: float) -> None:
    wait_until(lambda: time.monotonic() >= until_s, timeout_s=until_s - time.monotonic() + 60, every_s=0.01)


def _point(count: int, rounds: Sequence[dict[int, Run]]) -> Point:
    runs = [found[count] for found in rounds]
    first = min(rounds[0])
    linear = tuple(ratio(found[count].per_second, count * found[first].per_second / first) for found in rounds)
    return Point(
        primaries=count,
        per_second=median([run.per_second for run in runs]),
        of_linear=median(linear),
        all_of_linear=linear,
        node_us=median([run.node_us for run in runs]),
        worker_us=median([run.worker_us for run in runs]),
        node_share=median([run.node_share for run in runs]),
    )


def _report(options: Options, points: Sequence[Point], *, server: str) -> Report:
    rows = tuple(
        (
            str(point.primaries),
            number(point.per_second),
            f"{point.of_linear:.2f}",
            " ".join(f"{each:.2f}" for each in point.all_of_linear),
            number(point.node_us),
            number(point.worker_us),
            f"{point.node_share:.3f}",
        )
        for point in points
    )
    head = ("primaries", "jobs/s", "÷ linear", "all rounds", "nodes' µs/job", "workers' µs/job", "cores of a node")
    counts = tuple(float(point.primaries) for point in points)
    rates = tuple(point.per_second for point in points)
    lines = (Series("shiwu", rates), Series("linear", tuple(count * rates[0] / counts[0] for count in counts)))
    headlines = [
        Headline(f"{point.primaries} primaries ÷ linear", point.of_linear, "of linear", "more") for point in points[1:]
    ]
    headlines += [
        Headline(f"nodes' CPU with {point.primaries} ÷ {points[0].primaries} primaries", cost, "times", "less")
        for point in points[1:]
        if (cost := ratio(point.node_us, points[0].node_us))
    ]
    share = f"{options.node_share:g} of a core for each primary, {options.workers} stand-in workers"
    return Report(
        name="messages-cluster",
        headlines=tuple(headlines),
        tables=(Table(f"Primaries of one cluster: {share}, {options.shards_of_each} shards each", head, rows),),
        charts=(Chart("primaries of one cluster", counts, lines, "jobs/s", "primaries", kind="lines", is_log=True),),
        figures=Figures(tuple(points)),
        settings=options,
        server=server,
        notes=(f"{server}; every answer was counted by id; no append-only file, no replicas",),
    )
