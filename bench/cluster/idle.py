"""What idle shards cost a cluster, how soon a message in one of them is claimed, and what a worker that joins gets.

Workers here are the claims of a worker without its model: `ShardedClaims`, a thread for each shard, and `LaneWatch`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from tests.support.redis_parts import make_lease_queue
from tests.support.valkey_cluster import ValkeyCluster

from bench import traffic
from bench.charts import Chart, Series
from bench.report import Headline, Report, Table, median, number, ratio
from shiwu.broker.redis_url import read_redis_url
from shiwu.broker.sharding import PoolOptions, ShardRedis, cluster_shard, open_nodes, open_shards, shard_of
from shiwu.contract import Lane
from shiwu_worker.errors import FatalError
from shiwu_worker.jobs.job import Claimed
from shiwu_worker.policy.watchers import ROUND_S
from shiwu_worker.runtime.shard_health import ShardBackoff, ShardHealth
from shiwu_worker.stages.claim.lane_watch import LaneWatch
from shiwu_worker.stages.claim.shard_claims import ShardClaims
from shiwu_worker.stages.claim.sharded_claims import ShardedClaims

TIMEOUT_S: Final = 5.0
SETTLE_S: Final = 2.0
"""Until the first looks at empty lanes are over."""
JOIN_SHARDS: Final = 16
JOIN_WINDOW_S: Final = 1.0
CLAIM: Final = 16
"""Jobs of one claim of the workers that share a backlog."""
WORK_S: Final = 0.02
"""What such a worker does with them: nothing, for so long."""


@dataclass(frozen=True, slots=True)
class Rest:
    """One number of shards without messages, and messages that come one at a time."""

    shards: int
    is_watched: bool
    commands_per_second: float
    p50_ms: float
    p95_ms: float
    longest_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    rests: tuple[Rest, ...]
    joined: tuple[float, ...]
    """For each round, what a worker that joined another claimed in its first second, divided by half of all."""


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    shards: tuple[int, ...]
    rest_s: float
    messages: int
    rounds: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--shards", default="1,4,16", help="numbers of shards; default %(default)s")
    parser.add_argument("--rest-s", type=float, help="how long commands are counted; default 20")
    parser.add_argument("--messages", type=int, help="that come one at a time; default 300")
    parser.add_argument("--rounds", type=int, help="of workers that join; the median counts; default 5")


def run(asked: argparse.Namespace) -> Report:
    """Measure every number of shards, and a worker that joins."""
    options = Options(
        quick=asked.quick,
        shards=tuple(int(text) for text in asked.shards.split(",")),
        rest_s=asked.rest_s or (6.0 if asked.quick else 20.0),
        messages=asked.messages or (20 if asked.quick else 300),
        rounds=asked.rounds or (1 if asked.quick else 5),
    )
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        ValkeyCluster(folder=Path(name) / "cluster") as cluster,
    ):
        rests = [_rest(cluster, shards, options, is_watched=True) for shards in options.shards]
        rests.append(_rest(cluster, options.shards[-1], options, is_watched=False))
        joined = [_join(cluster) for _ in range(options.rounds)]
        version = str(cluster.ask(cluster.ports[0], "INFO", "SERVER").get("valkey_version", ""))
    return _report(options, Figures(tuple(rests), tuple(joined)), server=version)


class Claiming:
    """The claims of one worker, on a thread that passes on what was claimed."""

    def __init__(self, url: str, name: str, *, shards: int, is_watched: bool, limit: int, work_s: float) -> None:
        self.claimed: list[tuple[Claimed, float]] = []
        """Each job, and when it was claimed by the monotonic clock."""
        self._limit, self._work_s = limit, work_s
        self.clients = open_shards(url, PoolOptions(timeout_s=TIMEOUT_S))
        health, changed = ShardHealth(shards), threading.Condition()
        self._shards = [
            ShardClaims(
                index,
                make_lease_queue(client, name),
                changed=changed,
                backoff=ShardBackoff("claim", shard=index, health=health),
                on_fatal=_fail,
                on_dry=partial(self._look_at, index),
            )
            for index, client in enumerate(self.clients)
        ]
        self._watch = LaneWatch(
            [(cluster_shard(shard.index), shard) for shard in self._shards],
            open_nodes(read_redis_url(url, may_be_cluster=True), PoolOptions(timeout_s=TIMEOUT_S)),
            lanes=tuple(Lane),
            is_watched=lambda _: is_watched,
            round_pause_s=lambda: ROUND_S,
            on_fatal=_fail,
        )
        self._claims = ShardedClaims(
            self._shards,
            changed=changed,
            is_away=health.is_away,
            runs_nothing=lambda: True,
            close_timeout_s=TIMEOUT_S,
            on_close=self._watch.close,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _look_at(self, shard: int) -> None:
        self._watch.look_at(shard)

    def start(self) -> None:
        """Begin to claim."""
        for shard in self._shards:
            shard.thread.start()
        self._watch.thread.start()
        self._thread.start()

    def close(self) -> None:
        """Stop, and close all connections."""
        self._stop.set()
        self._claims.close()
        self._thread.join(TIMEOUT_S)
        for shard in self._shards:
            shard.thread.join(TIMEOUT_S)
        for client in self.clients:
            client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            jobs = self._claims.claim(self._limit).jobs
            now_s = time.monotonic()
            self.claimed += [(job, now_s) for job in jobs]
            if jobs:
                self._stop.wait(self._work_s)
            else:
                self._claims.wait(TIMEOUT_S)


def _fail(error: FatalError) -> NoReturn:
    raise error


@contextmanager
def _claiming(
    cluster: ValkeyCluster, name: str, *, shards: int, is_watched: bool = True, limit: int = 64, work_s: float = 0.0
) -> Iterator[Claiming]:
    worker = Claiming(
        cluster.url(shards=shards), name, shards=shards, is_watched=is_watched, limit=limit, work_s=work_s
    )
    try:
        yield worker
    finally:
        worker.close()


def _rest(cluster: ValkeyCluster, shards: int, options: Options, *, is_watched: bool) -> Rest:
    cluster.flush()
    with _claiming(cluster, "idle", shards=shards, is_watched=is_watched) as worker:
        worker.start()
        time.sleep(SETTLE_S)  # nothing shows that the threads have come to rest
        before, began_s = _calls(cluster), time.monotonic()
        time.sleep(options.rest_s)  # the measurement itself
        per_second = (_calls(cluster) - before) / (time.monotonic() - began_s)
        sent = _send_one_by_one(cluster, shards, options.messages)
        time.sleep(SETTLE_S)  # a message that is lost is missed below
        took_ms = sorted((claimed_s - sent[job.id]) * 1000 for job, claimed_s in worker.claimed)
    if len(took_ms) != options.messages:
        raise RuntimeError(f"expected {options.messages} claimed jobs, got {len(took_ms)}")
    at = [took_ms[int(len(took_ms) * share)] for share in (0.5, 0.95)]
    return Rest(shards, is_watched, per_second, at[0], at[1], took_ms[-1])


def _calls(cluster: ValkeyCluster) -> int:
    """The commands that all nodes have run, without those of this measurement."""
    stats = [cluster.ask(port, "INFO", "COMMANDSTATS") for port in cluster.ports]
    own = {"cmdstat_info", "cmdstat_hello", "cmdstat_client|setinfo"}
    return sum(each["calls"] for node in stats for command, each in node.items() if command not in own)


def _send_one_by_one(cluster: ValkeyCluster, shards: int, count: int) -> dict[str, float]:
    """Send messages to random shards; returns when each was sent, by the monotonic clock."""
    choose, sent = random.Random(0), {}
    clients = open_shards(cluster.url(shards=shards), PoolOptions(timeout_s=TIMEOUT_S))
    for job_id, message in _messages("one", count):
        time.sleep(choose.uniform(0.03, 0.07))  # a random pause, so that no timer runs in step
        sent[job_id] = time.monotonic()
        clients[shard_of(job_id, shards=shards)].lpush(Lane.INTERACTIVE.queue, message)
    for client in clients:
        client.close()
    return sent


def _messages(prefix: str, count: int) -> list[tuple[str, bytes]]:
    built = traffic.build(["s3://pictures/cat.jpg"], count=count, prefix=prefix, lane=Lane.INTERACTIVE)
    return [(message.id, message.raw) for message in built]


def _join(cluster: ValkeyCluster) -> float:
    """Two workers share a backlog in all shards; the second begins later."""
    cluster.flush()
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(_claiming(cluster, name, shards=JOIN_SHARDS, limit=CLAIM, work_s=WORK_S))
            for name in ("first", "second")
        )
        _fill(first.clients)
        first.start()
        time.sleep(JOIN_WINDOW_S)  # the first worker has the backlog to itself
        second.start()
        joined_s = time.monotonic()
        time.sleep(JOIN_WINDOW_S)  # the measurement itself
    of_first, of_second = (
        sum(joined_s <= at_s < joined_s + JOIN_WINDOW_S for _, at_s in worker.claimed) for worker in (first, second)
    )
    return ratio(of_second, (of_first + of_second) / 2)


def _fill(clients: Sequence[ShardRedis]) -> None:
    """As many messages as two workers cannot claim while it is measured."""
    most = int(4 * 2 * JOIN_WINDOW_S / WORK_S * CLAIM)
    groups: list[list[bytes]] = [[] for _ in clients]
    for job_id, raw in _messages("backlog", most):
        groups[shard_of(job_id, shards=len(clients))].append(raw)
    for client, raws in zip(clients, groups, strict=True):
        client.lpush(Lane.INTERACTIVE.queue, *raws)


def _report(options: Options, figures: Figures, *, server: str) -> Report:
    watched = [rest for rest in figures.rests if rest.is_watched]
    last = watched[-1]
    rows = tuple(
        (
            str(rest.shards),
            "watched" if rest.is_watched else "looked at in rounds",
            number(rest.commands_per_second),
            *(number(value) for value in (rest.p50_ms, rest.p95_ms, rest.longest_ms)),
        )
        for rest in figures.rests
    )
    head = ("shards", "by one worker", "commands/s at rest", "claimed after ms, p50", "p95", "longest")
    joined = median(figures.joined)
    return Report(
        name="shards",
        headlines=(
            Headline("commands/s at rest, divided by shards", ratio(last.commands_per_second, last.shards), "", "less"),
            Headline("share of a worker that joins, in its first second", joined, "of half", "more"),
        ),
        tables=(
            Table("idle shards on three nodes", head, rows),
            Table(
                f"a worker that joins another at a backlog in {JOIN_SHARDS} shards",
                ("first second", "of half of all"),
                tuple((str(round_), number(value)) for round_, value in enumerate(figures.joined, start=1)),
            ),
        ),
        charts=(
            Chart(
                title="from the message to its claim",
                x=tuple(f"{rest.shards}{'' if rest.is_watched else ', in rounds'}" for rest in figures.rests),
                series=(
                    Series("p50", tuple(rest.p50_ms for rest in figures.rests)),
                    Series("p95", tuple(rest.p95_ms for rest in figures.rests)),
                ),
                unit="ms",
            ),
        ),
        figures=figures,
        settings=options,
        server=f"Valkey {server}",
    )
