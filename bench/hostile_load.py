"""p99 of interactive jobs while a hostile producer fills the bulk lane, in relation to a worker without other load.

Each load gets a fresh server and a fresh worker. First the attack is enqueued, then interactive jobs come in an open
loop. A job without an answer counts with the time for which it was waited.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import redis
from tests.support.servers import Valkey

from bench import traffic
from bench.attacks import ATTACKS, ORDINARY, Attack, Target, dripping_servers
from bench.charts import Chart, Series
from bench.checkpoints import NAMES, checkpoint
from bench.openloop import send_when_due
from bench.photos import jpeg_files
from bench.picture_systems import Place, other_shiwu
from bench.report import Headline, Report, Table, number, ratio
from bench.sources import open_source
from shiwu.contract import COUNTERS, Lane

QUIET: Final = "no other load"
MAX_RATIO: Final = 2.0
MAX_P99_MS: Final = 2000.0
WARM_JOBS: Final = 30
PREFIX: Final = "user"
"""Of the ids of interactive jobs."""
STAGES: Final = ("queue", "claim", "fetch", "decode", "batch", "encode", "score")
"""Of `Timing`; what comes after them is the commit."""
WARM_TIMEOUT_S: Final = 120.0
LEAD_S: Final = 1.0
"""Between the last message of the attack and the first interactive job."""
SAMPLE_INTERVAL_S: Final = 0.2
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    model: str
    rate: float
    """Interactive jobs per second."""
    seconds: float
    drain_s: float
    """How long the last answers are waited for."""
    redis_mb: int
    """The server's maxmemory, without eviction."""
    seed: int
    only: tuple[str, ...]
    worker_settings: tuple[str, ...]

    @property
    def worker_env(self) -> dict[str, str]:
        """The worker's settings as environment variables."""
        pairs = (text.partition("=") for text in self.worker_settings)
        return {f"SHIWU_{name.upper()}": value for name, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Run:
    """Interactive latencies under one load, and what became of the load."""

    load: str
    messages: int
    """Messages of the load."""
    answered: int
    """Those of them that were answered when the last interactive job was."""
    jobs: int
    """Interactive jobs."""
    unanswered: int
    not_tagged: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    stages_ms: Mapping[str, float]
    """Stage → p99 of the interactive jobs."""
    reaped: int
    stuck: int
    """How often the worker reported that it was stuck."""
    has_ended: bool
    """Whether the worker's process ended."""
    redis_peak_mb: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    runs: tuple[Run, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    names = [attack.name for attack in (ORDINARY, *ATTACKS)]
    parser.add_argument("--model", default="embedded", help=f"{', '.join(NAMES)}, or a folder; default %(default)s")
    parser.add_argument("--rate", type=float, default=10.0, help="interactive jobs per second; default %(default)s")
    parser.add_argument("--seconds", type=float, help="duration of each run; default 30")
    parser.add_argument("--drain-s", type=float, default=60.0, help="wait for the last answers; default %(default)s")
    parser.add_argument("--redis-mb", type=int, default=512, help="maxmemory of the server; default %(default)s")
    parser.add_argument("--only", action="append", default=[], choices=names, help="only this load; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker")
    parser.add_argument("--seed", type=int, default=1)


def run(asked: argparse.Namespace) -> Report:
    """Measure without other load, with ordinary bulk jobs, and under each attack."""
    options = Options(
        quick=asked.quick,
        model=asked.model,
        rate=asked.rate,
        seconds=asked.seconds or (3.0 if asked.quick else 30.0),
        drain_s=asked.drain_s,
        redis_mb=asked.redis_mb,
        seed=asked.seed,
        only=tuple(asked.only),
        worker_settings=tuple(asked.set),
    )
    model = checkpoint(options.model)
    files = jpeg_files("512", count=4 if options.quick else 64)
    loads = [load for load in (ORDINARY, *ATTACKS) if not options.only or load.name in options.only]
    runs: list[Run] = []
    version = ""
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        open_source("s3", files, folder=Path(name)) as source,
        dripping_servers() as servers,
    ):
        target = Target(source.references, tuple(server.url("") for server in servers))
        hosts = {"SHIWU_ALLOW_HOSTS": ",".join(server.host for server in servers)}
        for order, load in enumerate((None, *loads)):
            with _open_server(Path(name) / f"run-{order}", options) as (url, client):
                place = Place(
                    url=url,
                    client=client,
                    folder=Path(name) / f"run-{order}",
                    source=source,
                    checkpoint=model,
                    lane=Lane.INTERACTIVE,
                    dtype="float32",
                    worker_env=hosts | options.worker_env,
                )
                runs.append(_measure(place, load, target, options))
                version = traffic.server_version(client)
    return _report(options, Figures(tuple(runs)), server=version, model=model.name, is_random=model.is_random)


@contextmanager
def _open_server(folder: Path, options: Options) -> Iterator[tuple[str, redis.Redis]]:
    config = {"maxmemory": f"{options.redis_mb}mb", "maxmemory-policy": "noeviction"}
    with Valkey(folder=folder / "valkey", config=config) as server, server.client(socket_timeout=60) as client:
        yield server.url, client


def _measure(place: Place, load: Attack | None, target: Target, options: Options) -> Run:
    """Warm a worker, enqueue the attack, and send interactive jobs."""
    attack = list(load.messages(target, is_quick=options.quick)) if load is not None else []
    with other_shiwu("", {}).open(place) as running:
        with traffic.listening(place.client) as listener:
            warm = traffic.build(place.source.references, count=WARM_JOBS, prefix="warm", lane=place.lane)
            for message in warm:
                traffic.send(place.client, place.lane, [message])
            listener.wait(len(warm), timeout_s=WARM_TIMEOUT_S, check=running.check)
        # The attack's answers are not read, because that would take time of the cores that the worker uses.
        with traffic.listening(place.client, prefix=PREFIX) as listener, _MemoryPeak(place) as memory:
            traffic.send(place.client, Lane.BULK, attack)
            latencies_ms, ids = _interactive(place, listener, options)
            answered = len(attack) - traffic.missing(place.client, [message.id for message in attack])
            missing = [job_id for job_id in ids if job_id not in listener.arrivals]
        replies = traffic.read_all(place.client, ids)
        log_text = running.processes[0].log_text()
        counters: Any = place.client.hgetall(COUNTERS)
        measured = Run(
            load=load.name if load is not None else QUIET,
            messages=len(attack),
            answered=answered,
            jobs=len(ids),
            unanswered=len(missing),
            not_tagged=sum(not reply.is_tagged for reply in replies) - len(missing),
            p50_ms=float(np.percentile(latencies_ms, 50)),
            p99_ms=float(np.percentile(latencies_ms, 99)),
            max_ms=max(latencies_ms),
            stages_ms=_stages(replies, latencies_ms),
            reaped=int(counters.get(b"reaped", 0)),
            stuck=log_text.count("worker_stuck"),
            has_ended=not running.processes[0].is_running,
            redis_peak_mb=memory.peak_bytes / MIB,
        )
    print(f"  {measured.load}: p99 {number(measured.p99_ms)} ms, {measured.unanswered} unanswered", flush=True)
    return measured


def _interactive(place: Place, listener: traffic.Listener, options: Options) -> tuple[list[float], list[str]]:
    """Send interactive jobs in an open loop; return their latencies in ms and their ids."""
    chance = np.random.default_rng(options.seed)
    count = max(2, int(options.rate * options.seconds))
    due_s = np.cumsum(chance.exponential(1 / options.rate, count)) + time.monotonic() + LEAD_S
    after_s = [float(each) for each in due_s - time.monotonic()]
    messages = traffic.build(place.source.references, count=count, prefix=PREFIX, lane=place.lane, after_s=after_s)
    ids = [message.id for message in messages]
    send_when_due(place, messages, due_s)
    until_s = time.monotonic() + options.drain_s
    while any(job_id not in listener.arrivals for job_id in ids) and time.monotonic() < until_s:
        time.sleep(SAMPLE_INTERVAL_S)  # the listener has a thread of its own; this one only looks whether it is done
    end_s = time.monotonic()
    arrivals = [listener.arrivals.get(job_id, end_s) for job_id in ids]
    return [(at_s - float(due)) * 1000 for at_s, due in zip(arrivals, due_s, strict=True)], ids


def _stages(replies: Sequence[traffic.Reply], latencies_ms: Sequence[float]) -> dict[str, float]:
    """Stage → p99 in ms; of the commit it is the part of the latency that no stage of the answer has."""
    timings = [reply.timing for reply in replies]
    found = {name: [getattr(timing, name) or 0.0 for timing in timings] for name in STAGES}
    found["commit"] = [latency - timing.total for latency, timing in zip(latencies_ms, timings, strict=True)]
    return {name: float(np.percentile(each, 99)) for name, each in found.items()}


class _MemoryPeak:
    """Samples the server's `used_memory` until the block ends."""

    def __init__(self, place: Place) -> None:
        self.peak_bytes = 0
        self._client = redis.Redis.from_url(place.url, socket_timeout=60)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> _MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(60)
        self._client.close()

    def _sample(self) -> None:
        while True:
            info: Any = self._client.info("memory")
            self.peak_bytes = max(self.peak_bytes, int(info["used_memory"]))
            if self._closed.wait(SAMPLE_INTERVAL_S):
                return


def _report(options: Options, figures: Figures, *, server: str, model: str, is_random: bool) -> Report:
    quiet, *others = figures.runs
    ratios = {each.load: ratio(each.p99_ms, quiet.p99_ms) for each in others}
    ordinary = next((each for each in others if each.load == ORDINARY.name), None)
    attacks = [each for each in others if each.load != ORDINARY.name]
    worst = max((ratios[each.load] for each in attacks), default=float("nan"))
    return Report(
        name="hostile-load",
        headlines=(
            Headline("interactive p99 under the worst attack ÷ without load", worst, "times", "less"),
            *(Headline(f"interactive p99, {each.load}", each.p99_ms, "ms", "less") for each in figures.runs),
        ),
        tables=(_table(figures, ratios, ordinary, options), _stage_table(figures)),
        charts=(
            Chart(
                "interactive p99",
                tuple(each.load for each in figures.runs),
                (Series("ms", tuple(each.p99_ms for each in figures.runs)),),
                "ms",
                is_log=True,
            ),
        ),
        figures=figures,
        settings=options,
        server=server,
        model=model,
        has_random_weights=is_random,
        notes=_notes(options, quiet, attacks, ratios),
    )


def _table(figures: Figures, ratios: Mapping[str, float], ordinary: Run | None, options: Options) -> Table:
    """The runs, with their p99 in relation to a worker without load, and to one with ordinary bulk jobs."""
    head = ("load", "messages", "answered", "p50 ms", "p99 ms", "÷ quiet", "÷ ordinary", "max ms", "unanswered")
    rows = tuple(
        (
            each.load,
            f"{each.messages:,}",
            f"{each.answered:,}",
            number(each.p50_ms),
            number(each.p99_ms),
            number(ratios[each.load]) if each.load in ratios else "1",
            number(ratio(each.p99_ms, ordinary.p99_ms)) if ordinary is not None else "",
            number(each.max_ms),
            f"{each.unanswered + each.not_tagged} of {each.jobs}",
            f"{each.reaped}",
            f"{each.stuck}{' ENDED' if each.has_ended else ''}",
            f"{each.redis_peak_mb:,.0f} of {options.redis_mb}",
        )
        for each in figures.runs
    )
    return Table(
        f"interactive jobs at {options.rate:g}/s under hostile load", (*head, "reaped", "stuck", "Redis MiB"), rows
    )


def _stage_table(figures: Figures) -> Table:
    names = (*STAGES, "commit")
    rows = tuple((each.load, *(number(each.stages_ms[name]) for name in names)) for each in figures.runs)
    return Table("p99 of each stage of the interactive jobs, ms", ("load", *names), rows)


def _notes(options: Options, quiet: Run, attacks: Sequence[Run], ratios: Mapping[str, float]) -> tuple[str, ...]:
    lines = [
        f"each load is enqueued in bulk {LEAD_S:g} s before the first of {quiet.jobs} interactive jobs; the worker's "
        f"settings: {', '.join(options.worker_settings) or 'its defaults'}",
        f"target: p99 at most {MAX_RATIO:g} times that without load and below {MAX_P99_MS / 1000:g} s, all interactive "
        "jobs tagged, nothing reaped, never stuck, Redis within its memory",
    ]
    lines += [f"MISSED: {each.load}: {', '.join(missed)}" for each in attacks if (missed := _missed(each, ratios))]
    return tuple(lines)


def _missed(measured: Run, ratios: Mapping[str, float]) -> list[str]:
    checks = {
        f"p99 is {number(ratios[measured.load])} times that without load": ratios[measured.load] > MAX_RATIO,
        f"p99 is {number(measured.p99_ms)} ms": measured.p99_ms >= MAX_P99_MS,
        f"{measured.unanswered + measured.not_tagged} jobs without tags": measured.unanswered + measured.not_tagged > 0,
        f"{measured.reaped} jobs reaped": measured.reaped > 0,
        f"stuck {measured.stuck} times": measured.stuck > 0,
        "the worker ended": measured.has_ended,
    }
    return [text for text, is_missed in checks.items() if is_missed]
