"""The benchmarks by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from bench.report import Report


@dataclass(frozen=True, slots=True)
class Bench:
    """One benchmark: a module with `add_options(parser)` and `run(asked)`.

    The module is imported only when used: torch takes seconds to load, and memory that would disturb a measurement.
    """

    name: str
    module: str
    about: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add its own options; --quick is common to all."""
        add: Callable[[argparse.ArgumentParser], None] = import_module(self.module).add_options
        add(parser)

    def run(self, asked: argparse.Namespace) -> Report:
        """Measure and return the report."""
        measure: Callable[[argparse.Namespace], Report] = import_module(self.module).run
        return measure(asked)


BENCHES: Final = {
    bench.name: bench
    for bench in (
        Bench(
            "messages", "bench.messages", "jobs a second from claim to commit, compared with Celery and celery-batches"
        ),
        Bench(
            "service", "bench.service", "images a second of the whole service, compared with the bare model and peers"
        ),
        Bench(
            "lock-budget",
            "bench.lock_budget",
            "what a job costs the worker beside the model, and how long a stand-in GPU waits for it",
        ),
        Bench("start", "bench.start", "images a second after a start on a busy machine, compared with a quiet start"),
        Bench("latency", "bench.latency", "p50, p95, p99 in an open loop, and of one image on an idle worker"),
        Bench(
            "hostile-load", "bench.hostile_load", "p99 of interactive jobs while a hostile producer fills the bulk lane"
        ),
        Bench("encode", "bench.encode", "the model alone: batch sizes, dtypes, and its share of the matrix rate"),
        Bench("scaling", "bench.scaling", "a backlog through the chart's autoscaling, from no worker to many to none"),
        Bench("backfill", "bench.backfill", "references a second that a backfill enqueues, and answers that it writes"),
        Bench("shards", "bench.cluster.idle", "what idle shards of a cluster cost, and how soon a message is claimed"),
        Bench("score", "bench.score", "what tags cost the score thread, by the number of labels"),
        Bench("fetch", "bench.fetch", "core-milliseconds of one object from S3, by each client of the store"),
        Bench("decode", "bench.decode", "core-milliseconds of one image, and the error of its pixels"),
    )
}
