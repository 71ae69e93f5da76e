"""Many stand-in workers on one Valkey: how the rate grows with them, and how soon a late worker gets its share.

The stand-in for a GPU sleeps, so that many of them fit on a machine of few cores. The limit is then the message path:
the workers' own CPU, which the table shows, or the one core of the Valkey.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from pydantic_core import from_json
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from bench import traffic, usage
from bench.charts import Chart, Series
from bench.message_systems import Cost
from bench.report import Headline, Report, Table, median, number, ratio
from bench.workers import StandInWorker
from shiwu.contract import COUNTERS, RESULT_STREAM, Lane

CAP: Final = 64
RAMP_S: Final = 1.0
MARGIN_S: Final = 2.0
JOIN_S: Final = 15.0
"""The backlog lasts so long, in which the late worker starts."""
SHARE_WINDOW_S: Final = 1.0
"""The share of the late worker is measured in its first second."""


@dataclass(frozen=True, slots=True)
class Point:
    """A number of workers on one Valkey."""

    workers: int
    per_second: float
    of_linear: float
    """Rate ÷ (workers × the rate of one worker)."""
    server_cores: float
    worker_cores: float
    """CPU of all workers together."""


@dataclass(frozen=True, slots=True)
class Join:
    """A worker that joins others while they work on a backlog."""

    workers: int
    """Number of workers, with the late one."""
    of_fair_share: float
    all_of_fair_share: tuple[float, ...]
    own: int
    total: int
    """Answers in its first second, in the last round."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    points: tuple[Point, ...]
    joins: tuple[Join, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    gpu: Cost
    workers: tuple[int, ...]
    window_s: float
    joins: tuple[int, ...]
    rounds: int
    cap: int = CAP

    @property
    def one_per_second(self) -> float:
        """Images per second of one stand-in GPU."""
        return self.cap / (self.gpu.per_picture_ms * self.cap + self.gpu.per_batch_ms) * 1000


@dataclass(frozen=True, slots=True)
class Spot:
    """Server and folder of the run."""

    url: str
    client: redis.Redis
    folder: Path
    server_pid: int


def add_options(parser: argparse._ArgumentGroup) -> None:
    """Its own options."""
    parser.add_argument("--scale", action="store_true", help="measure this instead")
    parser.add_argument(
        "--gpu", default="2:10", help="a:b of the stand-in GPU in ms; default %(default)s: 464 pictures/s"
    )
    parser.add_argument("--workers", help="how many at a time; default 1,2,4,8,16")
    parser.add_argument("--joins", help="how many there are with the late one; default 2,4,8")
    parser.add_argument("--window-s", type=float, help="how long each number is watched; default 8")


def run(asked: argparse.Namespace) -> Report:
    """Measure all numbers of workers, then the late ones."""
    options = Options(
        quick=asked.quick,
        gpu=Cost.read(asked.gpu),
        workers=_numbers(asked.workers or ("1,2" if asked.quick else "1,2,4,8,16")),
        window_s=asked.window_s or (1.5 if asked.quick else 8.0),
        joins=_numbers(asked.joins or ("2" if asked.quick else "2,4,8")),
        rounds=asked.rounds or (1 if asked.quick else 3),
    )
    points: list[Point] = []
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client() as client,
    ):
        spot = Spot(server.url, client, Path(name), server.pid)
        for count in options.workers:
            base = points[0].per_second / points[0].workers if points else None
            points.append(_point(spot, options, count, one_per_second=base))
            print(f"  {count} workers: {number(points[-1].per_second)} jobs/s", flush=True)
        joins = tuple(_join(spot, options, count) for count in options.joins)
        version = traffic.server_version(client)
    return _report(options, Figures(tuple(points), joins), server=version)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


@contextmanager
def _workers(spot: Spot, options: Options, count: int) -> Iterator[list[StandInWorker]]:
    """Start `count` workers and wait until they claim."""
    spot.client.flushall()
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(spot, options, number_)) for number_ in range(count)]
        for worker in workers:
            worker.wait_ready()
        yield workers


def _worker(spot: Spot, options: Options, number_: int) -> StandInWorker:
    cost = (options.gpu.per_picture_ms, options.gpu.per_batch_ms)
    return StandInWorker(
        redis_url=spot.url, name=f"worker{number_}", folder=spot.folder, slots=0, cap=options.cap, cost=cost
    )


def _point(spot: Spot, options: Options, count: int, *, one_per_second: float | None) -> Point:
    jobs = int(count * options.one_per_second * (RAMP_S + options.window_s + MARGIN_S))
    messages = traffic.build(["s3://pictures/cat.jpg"], count=jobs, prefix="job", lane=Lane.BULK)
    with _workers(spot, options, count) as workers:
        pids = [worker.pid for worker in workers]
        traffic.send(spot.client, Lane.BULK, messages)
        _wait_moment(time.monotonic() + RAMP_S)
        began_s, first, before = time.monotonic(), _answered(spot), _cpu(spot, pids)
        _wait_moment(began_s + options.window_s)
        took_s, last, after = time.monotonic() - began_s, _answered(spot), _cpu(spot, pids)
        if not spot.client.llen(Lane.BULK.queue):
            raise RuntimeError("the backlog was too short: one worker does more than its stand-in GPU allows")
        ids = [message.id for message in messages]
        wait_until(lambda: _answered(spot) >= jobs, timeout_s=120, every_s=0.05, what=f"{jobs} answers")
        if left := traffic.missing(spot.client, ids):
            raise RuntimeError(f"{left} of {jobs} jobs have no answer")
    per_second = (last - first) / took_s
    worker_cores, server_cores = ((end - start) / took_s for start, end in zip(before, after, strict=True))
    linear = ratio(per_second, count * (one_per_second or per_second / count))
    return Point(count, per_second, linear, server_cores, worker_cores)


def _join(spot: Spot, options: Options, count: int) -> Join:
    rounds = [_join_once(spot, options, count) for _ in range(options.rounds)]
    shares = tuple(ratio(own * count, total) for own, total in rounds)
    print(f"  the late one of {count}: {' '.join(number(share) for share in shares)} of its fair share", flush=True)
    return Join(count, median(shares), shares, *rounds[-1])


def _join_once(spot: Spot, options: Options, count: int) -> tuple[int, int]:
    """Return the answers in the late worker's first second: its own, and all."""
    jobs = int(count * options.one_per_second * JOIN_S)
    messages = traffic.build(["s3://pictures/cat.jpg"], count=jobs, prefix="job", lane=Lane.BULK)
    with _workers(spot, options, count - 1):
        traffic.send(spot.client, Lane.BULK, messages)
        _wait_moment(time.monotonic() + RAMP_S)
        with _worker(spot, options, count) as late:
            late.wait_ready()
            # The file's time, because this process may notice it late. Stream ids use the clock of the same machine.
            ready_ms = int(late.ready_file.stat().st_mtime * 1000)
            _wait_moment(time.monotonic() + SHARE_WINDOW_S + 0.1)
            if not spot.client.llen(Lane.BULK.queue):
                raise RuntimeError("the backlog was too short for the late one's start")
            entries: Any = spot.client.xrange(RESULT_STREAM, ready_ms, ready_ms + int(SHARE_WINDOW_S * 1000) - 1)
    names = [from_json(fields[b"answer"])["worker"] for _, fields in entries]
    return names.count(late.name), len(names)


def _answered(spot: Spot) -> int:
    return int(spot.client.hget(COUNTERS, "answered") or 0)


def _cpu(spot: Spot, pids: Sequence[int]) -> tuple[float, float]:
    return usage.cpu_s(pids), usage.cpu_s([spot.server_pid])


def _wait_moment(until_s: float) -> None:
    wait_until(lambda: time.monotonic() >= until_s, timeout_s=until_s - time.monotonic() + 60, every_s=0.01)


def _tables(figures: Figures) -> tuple[Table, ...]:
    rows = tuple(
        (
            str(point.workers),
            number(point.per_second),
            f"{point.of_linear:.3f}",
            f"{point.server_cores:.2f}",
            f"{point.worker_cores:.2f}",
        )
        for point in figures.points
    )
    joins = tuple(
        (
            f"{join.workers}",
            f"{join.of_fair_share:.2f}",
            " ".join(f"{each:.2f}" for each in join.all_of_fair_share),
            f"{join.own} of {join.total}",
        )
        for join in figures.joins
    )
    return (
        Table("Workers on one Valkey", ("workers", "jobs/s", "÷ linear", "Valkey cores", "workers' cores"), rows),
        Table(
            "A worker that joins a backlog late: answers in its first second",
            ("workers with it", "÷ fair share", "all rounds", "its own, last round"),
            joins,
        ),
    )


def _report(options: Options, figures: Figures, *, server: str) -> Report:
    most = figures.points[-1]
    counts = tuple(float(point.workers) for point in figures.points)
    rates = tuple(point.per_second for point in figures.points)
    linear = tuple(count * rates[0] / counts[0] for count in counts)
    lines = (Series("shiwu", rates), Series("linear", linear))
    return Report(
        name="messages-scale",
        headlines=(
            Headline(f"{most.workers} workers ÷ linear", most.of_linear, "of linear", "more"),
            *(
                Headline(f"late one of {join.workers}", join.of_fair_share, "of its fair share in 1 s", "more")
                for join in figures.joins
            ),
        ),
        tables=_tables(figures),
        charts=(
            Chart("stand-in workers on one Valkey", counts, lines, "jobs/s", "workers", kind="lines", is_log=True),
        ),
        figures=figures,
        settings=options,
        server=server,
        notes=(
            f"{server}; stand-in GPU of {options.gpu}, batches up to {options.cap}: "
            f"{number(options.one_per_second)} pictures/s each",
            "every answer of the first table was counted by id",
        ),
    )
