"""Whether one worker process keeps a fast GPU busy: the device's idle share, and the worker's CPU for each job.

The threads of a worker take turns under Python's lock: at 10,000 images a second each may take 100 µs of it. A stand-in
device takes the time of a real one (by default 6.4 ms for 64 images), everything between Redis and Redis is real except
fetching and decoding, and loaders' frames go through processes that return them immediately (`bench.echo_loaders`).
A backlog waits all the time, so an idle device waits for the worker.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.servers import Valkey

from bench import traffic
from bench.charts import Chart, Series
from bench.report import Headline, Report, Table, median, number, ratio
from shiwu.contract import Lane

FIXED_SHARE: Final = 0.1
"""Share of a batch's time that does not depend on its images."""
TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Device:
    """A stand-in device."""

    batch: int
    batch_ms: float
    load: float
    """Share of the device's rate that the worker has to reach: the device is slower by this factor."""

    @property
    def per_second(self) -> float:
        """Images a second that it can do."""
        return self.batch / self.batch_ms * 1000 * self.load

    @property
    def costs_ms(self) -> tuple[float, float]:
        """Milliseconds of each image, and of each batch beside its images."""
        batch_ms = self.batch_ms / self.load
        return (1 - FIXED_SHARE) * batch_ms / self.batch, FIXED_SHARE * batch_ms


@dataclass(frozen=True, slots=True)
class Budget:
    """One device, with frames of loaders or without."""

    batch: int
    load: float
    has_frames: bool
    device_per_second: float
    per_second: float
    idle_share: float
    worker_us: float
    """CPU of the worker process for one job."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    budgets: tuple[Budget, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    jobs: int
    rounds: int
    batches: tuple[int, ...]
    loads: tuple[float, ...]
    image_us: float
    echo_loaders: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--jobs", type=int, help="in each round; default 60,000")
    parser.add_argument("--rounds", type=int, help="the median counts; default 3")
    parser.add_argument("--batches", default="64,256", help="largest batches; default %(default)s")
    parser.add_argument("--loads", default="0.8,1.0", help="shares of the device's rate; default %(default)s")
    parser.add_argument("--image-us", type=float, default=100.0, help="time of the device for an image; default 100")
    parser.add_argument("--echo-loaders", type=int, default=2, help="processes that return frames; default 2")


def run(asked: argparse.Namespace) -> Report:
    """Measure every device, with frames and without."""
    options = Options(
        quick=asked.quick,
        jobs=asked.jobs or (1000 if asked.quick else 60_000),
        rounds=asked.rounds or (1 if asked.quick else 3),
        batches=tuple(int(text) for text in asked.batches.split(",")),
        loads=tuple(float(text) for text in asked.loads.split(",")),
        image_us=asked.image_us,
        echo_loaders=asked.echo_loaders,
    )
    devices = [
        Device(batch, batch * options.image_us / 1000, load) for batch in options.batches for load in options.loads
    ]
    budgets: list[Budget] = []
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client() as client,
    ):
        version = traffic.server_version(client)
        for device in devices:
            for loaders in (0, options.echo_loaders):
                rounds = [_measure(server, device, loaders=loaders, jobs=options.jobs) for _ in range(options.rounds)]
                budgets.append(_budget(device, rounds, has_frames=loaders > 0))
    return _report(options, budgets, server=version)


def _measure(server: Valkey, device: Device, *, loaders: int, jobs: int) -> dict[str, float]:
    """Let one worker answer one backlog; returns what it prints.

    Raises:
        RuntimeError: the worker ended without an answer to every job.
    """
    with server.client() as client:
        client.flushall()
        messages = traffic.build(["s3://pictures/cat.jpg"], count=jobs, prefix="job", lane=Lane.BULK)
        traffic.send(client, Lane.BULK, messages)
    per_picture_ms, per_batch_ms = device.costs_ms
    options = {
        "redis-url": server.url,
        "jobs": jobs,
        "cap": device.batch,
        # Three batches and those that loaders hold, as a real worker.
        "slots": 3 * device.batch + 128,
        "per-picture-ms": per_picture_ms,
        "per-batch-ms": per_batch_ms,
        "echo-loaders": loaders,
        "limit-s": TIMEOUT_S,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.standin", *words],
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S + 60,
        check=False,
    )
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1]) if ended.stdout else {}
    if ended.returncode or found.get("answered", 0) < jobs:
        raise RuntimeError(f"expected {jobs} answers and exit code 0, got {found} and {ended.returncode}")
    return found


def _budget(device: Device, rounds: list[dict[str, float]], *, has_frames: bool) -> Budget:
    return Budget(
        batch=device.batch,
        load=device.load,
        has_frames=has_frames,
        device_per_second=device.per_second,
        per_second=median([ratio(each["answered"], each["seconds"]) for each in rounds]),
        idle_share=median([idle_share(each["device_busy_s"], each["device_idle_s"]) for each in rounds]),
        worker_us=median([ratio(each["cpu_seconds"], each["answered"]) * 1e6 for each in rounds]),
    )


def idle_share(busy_s: float, idle_s: float) -> float:
    """Return the share of the time, from the first batch on, in which the device had nothing to do."""
    return ratio(idle_s, busy_s + idle_s)


def _report(options: Options, budgets: list[Budget], *, server: str) -> Report:
    names = [
        f"{each.batch} images, {each.load:.0%} of the rate, {'with' if each.has_frames else 'without'} frames"
        for each in budgets
    ]
    rows = tuple(
        (
            name,
            number(each.device_per_second),
            number(each.per_second),
            f"{each.idle_share:.1%}",
            number(each.worker_us),
        )
        for name, each in zip(names, budgets, strict=True)
    )
    head = ("largest batch", "device images/s", "jobs/s", "device idle", "worker µs/job")
    headlines = [
        Headline(f"µs/job, {name}", each.worker_us, "µs", "less") for name, each in zip(names, budgets, strict=True)
    ]
    series = Series("device idle", tuple(100 * each.idle_share for each in budgets))
    return Report(
        name="lock-budget",
        headlines=tuple(headlines),
        tables=(Table("One worker process in front of a stand-in device; a backlog waits all the time", head, rows),),
        charts=(Chart("share of the time that the device waits", tuple(names), (series,), "%"),),
        figures=Figures(tuple(budgets)),
        settings=options,
        server=server,
        notes=(
            "worker µs/job is CPU of the worker process, loaders not counted: below 100 µs one process can do 10,000/s",
            "fetching, decoding and the copy of pixels are left out; loaders on the same cores would slow the worker",
        ),
    )
