"""Simulates the chart's autoscaling of a backlog while interactive jobs arrive: from no worker to many to none.

The ScaledObject is rendered by helm and read by `bench.autoscaler`; local processes with a stand-in for the model are
the pods. Every answer is counted by id; interactive latency counts from when a job was due (an open loop).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import redis
from tests.support import chart, chart_tools
from tests.support.servers import Valkey

from bench import traffic
from bench.autoscaler import Autoscaler, Rules
from bench.message_systems import Cost
from bench.pods import Pods
from bench.report import Report
from bench.scaling_report import Figures, Options, Sample, make_report, windows_of
from bench.workers import StandInWorker
from shiwu.broker.queue_stats import count_waiting
from shiwu.contract import CLAIMS, RESULT_STREAM, Lane

TICK_S: Final = 0.05
REFERENCE: Final = ("s3://pictures/cat.jpg",)
CHUNK_SIZE: Final = 5000


def add_options(parser: argparse._ArgumentGroup) -> None:
    """Its own options."""
    parser.add_argument("--jobs", type=int, help="backlog of the bulk lane; default 100000")
    parser.add_argument("--rate", type=float, help="interactive jobs a second; default 10")
    parser.add_argument("--gpu", help="a:b of the stand-in GPU, a·n + b ms; default 4:8, which is 222 pictures/s")
    parser.add_argument("--most", type=int, help="most workers; default 6")


def run(asked: argparse.Namespace) -> Report:
    """Run from the backlog to the end of the last worker."""
    usual = Options.quick() if asked.quick else Options.full()
    options = usual.with_(
        jobs=asked.jobs, rate=asked.rate, gpu=Cost.read(asked.gpu) if asked.gpu else None, most=asked.most
    )
    rules, env, grace_s = _rendered(options)
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client() as client,
        server.client() as second,
        traffic.listening(client) as listener,
    ):

        def make(number: int) -> StandInWorker:
            return StandInWorker(
                redis_url=server.url,
                name=f"pod-{number}",
                folder=Path(name),
                slots=0,
                cap=options.cap,
                cost=(options.gpu.per_picture_ms, options.gpu.per_batch_ms),
                grace_s=float(env["SHIWU_GRACE_S"]),
                # The stream must keep all entries, so that every answer can be counted.
                env={"SHIWU_LOADERS": env["SHIWU_LOADERS"], "SHIWU_STREAM_LENGTH": str(4 * options.jobs + 10_000)},
            )

        bulk = traffic.build(REFERENCE, count=options.jobs, prefix="b", lane=Lane.BULK)
        with (
            Pods(make, start_s=options.start_s, grace_s=grace_s) as pods,
            Interactive(second, rate=options.rate, limit_s=options.limit_s) as interactive,
        ):
            simulation = _Simulation(client, options, Autoscaler(rules, options.sync_s), pods, interactive, listener)
            traffic.send(client, Lane.BULK, bulk)
            simulation.follow()
        figures = simulation.figures([*(message.id for message in bulk), *interactive.sent])
        version = traffic.server_version(client)
    return make_report(options, rules, figures, server=version)


def _rendered(options: Options) -> tuple[Rules, Mapping[str, Any], float]:
    """Render the chart with helm: (rules of the ScaledObject, the workers' variables, the pods' grace time in s)."""
    path = chart_tools.find("helm4")
    if path is None:
        raise RuntimeError("expected a helm: `make chart-tools` installs it")
    manifests = chart.Helm(path).render(options.values)
    pod = chart.of_kind(manifests, "Deployment", "worker")["spec"]["template"]["spec"]
    rules = Rules.read(chart.of_kind(manifests, "ScaledObject"))
    return rules, chart.variables(pod["containers"][0]), float(pod["terminationGracePeriodSeconds"])


class Interactive:
    """Sends single jobs at fixed moments, on its own thread, until it is closed."""

    def __init__(self, client: redis.Redis, *, rate: float, limit_s: float) -> None:
        self._client = client
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send, name="interactive", daemon=True)
        count = int(rate * limit_s)
        self._messages = traffic.build(REFERENCE, count=count, prefix="i", lane=Lane.INTERACTIVE)
        self._due_s = np.cumsum(np.random.default_rng(20261125).exponential(1 / rate, count))
        self.sent: dict[str, float] = {}
        """id → moment at which it was due, on the monotonic clock."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Send no more."""
        self._closed.set()
        self._thread.join(10.0)

    def _send(self) -> None:
        began_s = time.monotonic()
        for message, due_s in zip(self._messages, self._due_s, strict=True):
            if self._closed.wait(max(0.0, began_s + due_s - time.monotonic())):
                return
            traffic.send(self._client, Lane.INTERACTIVE, [message])
            self.sent[message.id] = began_s + float(due_s)


class _Simulation:
    """The run of the simulation: polls, scales and samples until the last worker ends."""

    def __init__(  # noqa: PLR0917 one argument for each part
        self,
        client: redis.Redis,
        options: Options,
        scaler: Autoscaler,
        pods: Pods,
        interactive: Interactive,
        listener: traffic.Listener,
    ) -> None:
        self._client, self._options, self._scaler = client, options, scaler
        self._pods, self._interactive, self._listener = pods, interactive, listener
        self._began_s = time.monotonic()
        self._asked_s = self._sampled_s = self._done_s = 0.0
        self._metric = 0.0
        self._first_ready_s: float | None = None
        self._samples: list[Sample] = []

    def follow(self) -> None:
        """Run until the last worker has ended.

        Raises:
            TimeoutError: it has not ended in time.
        """
        pause = threading.Event()
        while not self._is_over():
            now_s = time.monotonic() - self._began_s
            if now_s > self._options.limit_s:
                raise TimeoutError(f"expected no worker after {self._options.limit_s:g} s; {self._samples[-1]}")
            self._pods.update()
            if self._first_ready_s is None and self._pods.ready:
                self._first_ready_s = now_s
            if now_s - self._asked_s >= self._scaler.rules.poll_s or not self._samples:
                self._asked_s = now_s
                self._metric = self._scaler.rules.metric(self._client)
                self._pods.scale(self._scaler.decide(self._metric, now_s=now_s))
            if now_s - self._sampled_s >= self._options.sample_s or not self._samples:
                self._sampled_s = now_s
                self._samples.append(self._sample(now_s))
            pause.wait(TICK_S)

    def _is_over(self) -> bool:
        now_s = time.monotonic() - self._began_s
        if not self._done_s and len(self._listener.arrivals) - len(self._interactive.sent) >= self._options.jobs:
            self._done_s = now_s
        if self._done_s and now_s - self._done_s >= self._options.tail_s:
            self._interactive.close()
            return self._scaler.wanted == 0 and self._pods.processes == 0
        return False

    def _sample(self, now_s: float) -> Sample:
        waiting = count_waiting(self._client, list(Lane))
        return Sample(
            at_s=round(now_s, 2),
            bulk=waiting[Lane.BULK],
            interactive=waiting[Lane.INTERACTIVE],
            claimed=int(self._client.hlen(CLAIMS)),
            metric=self._metric,
            wanted=self._scaler.wanted,
            ready=self._pods.ready,
            answered=len(self._listener.arrivals),
        )

    def figures(self, ids: Sequence[str]) -> Figures:
        """Count the results by id."""
        entries = _entries(self._client)
        lost = traffic.missing(self._client, ids)
        twice = sum(entries[job_id] > 1 for job_id in ids)
        unknown = len(entries.keys() - set(ids))
        if lost or twice or unknown or len(entries) != len(ids) or self._client.hlen(CLAIMS):
            raise RuntimeError(f"expected each of {len(ids)} jobs once: {lost} lost, {twice} twice, {unknown} others")
        arrivals = self._listener.arrivals
        took = [
            (due_s - self._began_s, (arrivals[job_id] - due_s) * 1000)
            for job_id, due_s in self._interactive.sent.items()
        ]
        first_s = self._first_ready_s or 0.0
        early = [ms for at_s, ms in took if at_s < first_s]
        return Figures(
            jobs=len(ids),
            lost=lost,
            twice=twice,
            first_ready_s=first_s,
            bulk_done_s=self._done_s,
            ended_s=self._samples[-1].at_s,
            most_ready=max(sample.ready for sample in self._samples),
            pods=self._pods.made,
            longest_drain_s=max(self._pods.drains_s),
            from_zero=len(early),
            from_zero_max_ms=max(early, default=float("nan")),
            windows=windows_of([(at_s, ms) for at_s, ms in took if at_s >= first_s], width_s=self._options.window_s),
            samples=tuple(self._samples),
        )


def _entries(client: redis.Redis) -> Counter[str]:
    """Return how often each id is in the results stream."""
    found: Counter[str] = Counter()
    after = "-"
    while entries := client.xrange(RESULT_STREAM, after, count=CHUNK_SIZE):
        page: Any = entries
        found.update(fields[b"id"].decode() for _, fields in page)
        after = f"({page[-1][0].decode()}"
    return found
