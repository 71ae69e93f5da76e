"""References a second that `shiwu backfill` enqueues from JSON lines, and answers a second that it writes to parts.

No worker runs while references are enqueued: the lane takes all of them. Then all are answered, and only then the
answers are collected, so neither rate is limited by the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import redis
from tests.support.answering import entry_of
from tests.support.backfills import LocalBackfill, write_list
from tests.support.redis_parts import make_lease_queue
from tests.support.servers import Valkey

from bench import traffic
from bench.charts import Chart, Series
from bench.report import Headline, Report, Table, median, number
from shiwu.backfill.plan import Pace, Plan
from shiwu.broker.answers import AnswerStore
from shiwu.broker.retention import Retention
from shiwu.contract import Lane

FORMATS: Final[tuple[Literal["jsonl", "parquet"], ...]] = ("jsonl", "parquet")
BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Round:
    """One backfill: rates per second of this process, and CPU time for one reference or answer."""

    kind: str
    enqueued_per_s: float
    enqueue_cpu_us: float
    enqueue_server_us: float
    """CPU time of the server for one reference."""
    written_per_s: float
    write_cpu_us: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    references: int
    rounds: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--references", type=int, help="in each backfill; default 200,000")
    parser.add_argument("--rounds", type=int, help="with each format; default 3")


def run(asked: argparse.Namespace) -> Report:
    """Run backfills with both formats in turn, each on an empty server."""
    count = asked.references or (5_000 if asked.quick else 200_000)
    rounds = asked.rounds or (1 if asked.quick else 3)
    with (
        tempfile.TemporaryDirectory() as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client() as client,
    ):
        found = tuple(_rounds(Path(name), server.url, client, count=count, rounds=rounds))
        version = traffic.server_version(client)
    return _report(Options(asked.quick, count, rounds), Figures(found), server=version)


def _rounds(folder: Path, url: str, client: redis.Redis, *, count: int, rounds: int) -> Iterator[Round]:
    images = write_list(folder / "list.jsonl", count)
    for turn in range(rounds):
        for kind in FORMATS:
            client.flushall()
            plan = Plan(str(images), out=str(folder / f"{kind}-{turn}"), format=kind)
            with LocalBackfill(url) as backfill:
                found = _round(backfill, client, plan, count=count)
            print(f"  {kind}: {number(found.enqueued_per_s)}/s, {number(found.written_per_s)}/s", flush=True)
            yield found


def _round(backfill: LocalBackfill, client: redis.Redis, plan: Plan, *, count: int) -> Round:
    pace = Pace(max_waiting=10_000_000)
    server_s = _server_s(client)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    sent: list[tuple[float, float]] = []

    def is_stopping() -> bool:
        """End once the lane holds all of them; asked between two portions."""
        if not sent and client.llen(Lane.BULK.queue) >= count:
            sent.append((time.perf_counter(), time.process_time()))
        return bool(sent)

    backfill.run("bench", plan, pace, is_stopping=is_stopping)
    ended_s, ended_cpu_s = sent[0]
    server_s = _server_s(client) - server_s
    _answer_all(client, count)
    collect_s, collect_cpu_s = time.perf_counter(), time.process_time()
    backfill.run("bench", plan, pace)
    return Round(
        kind=plan.format,
        enqueued_per_s=count / (ended_s - began_s),
        enqueue_cpu_us=(ended_cpu_s - began_cpu_s) / count * 1e6,
        enqueue_server_us=server_s / count * 1e6,
        written_per_s=count / (time.perf_counter() - collect_s),
        write_cpu_us=(time.process_time() - collect_cpu_s) / count * 1e6,
    )


def _server_s(client: redis.Redis) -> float:
    """CPU seconds that the server has used."""
    used: Any = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _answer_all(client: redis.Redis, count: int) -> None:
    queue = make_lease_queue(client, "bench", bulk_share=1.0)
    retention = Retention(result_ttl_s=3600, done_ttl_s=7200, stream_length=2 * count)
    answers = AnswerStore(client, token="bench", retention=lambda: retention)  # noqa: S106 the name of a writer
    left = count
    while left > 0:
        jobs = queue.claim(BATCH).jobs
        answers.write([entry_of(job) for job in jobs])
        left -= len(jobs)


def _report(options: Options, figures: Figures, *, server: str) -> Report:
    def of(kind: str, field: str) -> float:
        return median([getattr(each, field) for each in figures.rounds if each.kind == kind])

    enqueued = median([each.enqueued_per_s for each in figures.rounds])
    columns = ("enqueued_per_s", "enqueue_cpu_us", "enqueue_server_us", "written_per_s", "write_cpu_us")
    rows = tuple((kind, *(number(of(kind, name)) for name in columns)) for kind in FORMATS)
    return Report(
        name="backfill",
        headlines=(
            Headline("references enqueued", enqueued, "/s", "more"),
            Headline("CPU of a reference", median([each.enqueue_cpu_us for each in figures.rounds]), "µs", "less"),
            Headline("answers written as JSON lines", of("jsonl", "written_per_s"), "/s", "more"),
            Headline("answers written as Parquet", of("parquet", "written_per_s"), "/s", "more"),
        ),
        tables=(
            Table(
                f"shiwu backfill, {options.references:,} references in JSON lines, median of {options.rounds}",
                ("results", "enqueued/s", "CPU µs each", "server µs each", "written/s", "CPU µs each"),
                rows,
            ),
        ),
        charts=(
            Chart(
                "rates of a backfill",
                FORMATS,
                tuple(
                    Series(label, tuple(of(kind, name) for kind in FORMATS))
                    for label, name in (("enqueued", "enqueued_per_s"), ("written", "written_per_s"))
                ),
                "a second",
            ),
        ),
        figures=figures,
        settings=options,
        server=server,
    )
