"""Options, figures and report of the simulated scaling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bench.autoscaler import Rules
from bench.charts import Chart, Series
from bench.message_systems import Cost
from bench.report import Headline, Report, Table, number

MIN_IN_WINDOW: Final = 10
"""A p95 of fewer answers has no meaning."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the run; `values` go to the chart."""

    jobs: int
    rate: float
    gpu: Cost
    most: int
    jobs_per_worker: int
    poll_s: int
    cooldown_s: int
    down_window_s: int
    sync_s: float
    start_s: float
    window_s: float
    sample_s: float
    tail_s: float
    """Interactive jobs go on for so long after the backlog."""
    limit_s: float
    cap: int = 16

    @classmethod
    def full(cls) -> Options:
        """Return KEDA's default polls and the HPA's default rounds, with windows of seconds, not minutes."""
        return cls(
            jobs=100_000,
            rate=10,
            gpu=Cost.read("4:8"),
            most=6,
            jobs_per_worker=4500,
            poll_s=5,
            cooldown_s=30,
            down_window_s=30,
            sync_s=15,
            start_s=10,
            window_s=10,
            sample_s=1,
            tail_s=20,
            limit_s=530,
        )

    @classmethod
    def quick(cls) -> Options:
        """Return small values, for a run of seconds."""
        return cls(
            jobs=2500,
            rate=20,
            gpu=Cost.read("4:10"),
            most=3,
            jobs_per_worker=300,
            poll_s=1,
            cooldown_s=2,
            down_window_s=2,
            sync_s=1,
            start_s=0,
            window_s=2,
            sample_s=0.25,
            tail_s=1,
            limit_s=120,
        )

    def with_(self, **given: Any) -> Options:
        """Replace the values that are not None."""
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def values(self) -> dict[str, Any]:
        """Values for the chart."""
        return {
            "redis": {"host": "127.0.0.1"},
            "worker": {"maxBatch": self.cap},
            "autoscaling": {
                "keda": {
                    "enabled": True,
                    "maxReplicas": self.most,
                    "jobsPerWorker": self.jobs_per_worker,
                    "pollingIntervalS": self.poll_s,
                    "cooldownS": self.cooldown_s,
                    "scaleDownWindowS": self.down_window_s,
                }
            },
        }

    @property
    def one_per_second(self) -> float:
        """Images per second of one stand-in GPU."""
        return self.cap / (self.gpu.per_picture_ms * self.cap + self.gpu.per_batch_ms) * 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment."""

    at_s: float
    bulk: int
    interactive: int
    claimed: int
    metric: float
    """Value of the formula at KEDA's last poll."""
    wanted: int
    ready: int
    answered: int


@dataclass(frozen=True, slots=True)
class Window:
    """Interactive jobs that were due in this window; ms from due to answer."""

    from_s: float
    answers: int
    p50_ms: float
    p95_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Results of the run."""

    jobs: int
    lost: int
    twice: int
    first_ready_s: float
    bulk_done_s: float
    ended_s: float
    most_ready: int
    pods: int
    longest_drain_s: float
    from_zero: int
    """Interactive jobs that were due before the first worker was ready."""
    from_zero_max_ms: float
    windows: tuple[Window, ...]
    """Windows from the first ready worker on."""
    samples: tuple[Sample, ...]

    @property
    def worst_p95_ms(self) -> float:
        """The largest p95 of all windows."""
        return max(window.p95_ms for window in self.windows)


def windows_of(took: Sequence[tuple[float, float]], *, width_s: float) -> tuple[Window, ...]:
    """Group (moment due in s, latency in ms) into windows; one with too few answers joins the window before it."""
    parts: dict[int, list[float]] = {}
    for at_s, ms in took:
        parts.setdefault(int(at_s // width_s), []).append(ms)
    joined: list[tuple[int, list[float]]] = []
    for at, part in sorted(parts.items()):
        if joined and len(part) < MIN_IN_WINDOW:
            joined[-1][1].extend(part)
        else:
            joined.append((at, part))
    return tuple(_window(at * width_s, part) for at, part in joined)


def _window(from_s: float, part: list[float]) -> Window:
    p50, p95 = (float(np.percentile(part, share)) for share in (50, 95))
    return Window(from_s=from_s, answers=len(part), p50_ms=p50, p95_ms=p95, max_ms=max(part))


def make_report(options: Options, rules: Rules, figures: Figures, *, server: str) -> Report:
    """Make the tables and charts."""
    return Report(
        name="scaling",
        headlines=(
            Headline("interactive, worst p95 of a window", figures.worst_p95_ms, "ms", "less"),
            Headline("backlog done", figures.bulk_done_s, "s", "less"),
        ),
        tables=(_table(options, figures),),
        charts=_charts(figures),
        figures=figures,
        settings=options,
        server=server,
        notes=(
            f"{server}; stand-in GPU of {options.gpu}, batches up to {options.cap}: "
            f"{number(options.one_per_second)} pictures/s each; its process starts {options.start_s:g} s after it is "
            "asked for",
            f"the chart's formula, {rules.formula}, ÷ {rules.target:g}; asked every {rules.poll_s:g} s, HPA every "
            f"{options.sync_s:g} s, scaling down looks {rules.window_s:g} s back, to none after {rules.cooldown_s:g} s "
            "without a job",
            "every answer was counted by id: each job once; interactive latency counts from the moment a job was due",
        ),
    )


def _table(options: Options, figures: Figures) -> Table:
    rows = (
        ("jobs, each answered once", f"{figures.jobs:,}"),
        ("lost, twice", f"{figures.lost}, {figures.twice}"),
        ("first worker ready", f"{figures.first_ready_s:.1f} s"),
        ("most workers ready", f"{figures.most_ready} of {options.most}"),
        ("backlog done", f"{figures.bulk_done_s:.0f} s"),
        ("last worker gone", f"{figures.ended_s:.0f} s"),
        ("pods started; longest drain", f"{figures.pods}; {figures.longest_drain_s:.1f} s"),
        ("interactive p50, of all windows", f"{number(_median_p50_ms(figures))} ms"),
        (f"interactive p95, worst of {len(figures.windows)} windows", f"{number(figures.worst_p95_ms)} ms"),
        ("interactive, longest", f"{number(max(window.max_ms for window in figures.windows))} ms"),
        (f"the {figures.from_zero} due before a worker was ready, longest", f"{number(figures.from_zero_max_ms)} ms"),
    )
    return Table("From no worker to many to none", ("", ""), rows)


def _median_p50_ms(figures: Figures) -> float:
    return float(np.median([window.p50_ms for window in figures.windows]))


def _charts(figures: Figures) -> tuple[Chart, ...]:
    samples = figures.samples
    at = tuple(sample.at_s for sample in samples)
    starts = tuple(window.from_s for window in figures.windows)

    def line(name: str) -> Series:
        return Series(name, tuple(float(getattr(sample, name)) for sample in samples))

    def share(name: str) -> Series:
        return Series(name.removesuffix("_ms"), tuple(float(getattr(window, name)) for window in figures.windows))

    latency = (share("p50_ms"), share("p95_ms"), Series("one second", (1000.0,) * len(starts)))
    jobs = (Series("waiting in bulk", line("bulk").values), line("claimed"))
    return (
        Chart("workers", at, (line("wanted"), line("ready")), "workers", "s", kind="lines"),
        Chart("jobs", at, jobs, "jobs", "s", kind="lines"),
        Chart("interactive, by when they were due", starts, latency, "ms", "s", kind="lines"),
        Chart("answered", at, (line("answered"),), "jobs", "s", kind="lines"),
    )
