"""Pictures a second from a backlog, in steady state: from the first answer to the last."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench import traffic
from bench.gpu import Load, watching
from bench.picture_systems import Place, Running
from bench.report import median, ratio
from bench.traffic import Reply
from shiwu.contract import Stage

PROBE: Final = 4
LEAST: Final = 12
MOST: Final = 500_000
PROBE_S: Final = 2.0
PATIENCE_S: Final = 600.0
STAGES: Final = tuple(stage.value for stage in Stage if stage is not Stage.COMMIT)
"""Commit lies after the answer, which can't tell of it."""
_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class StageTime:
    """Mean milliseconds of a picture in one stage."""

    stage: str
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Drained:
    """One backlog."""

    pictures: int
    per_second: float
    own_cpu_s: float
    """CPU seconds for one picture of the system's own processes: for shiwu the worker's, with the model."""
    below_cpu_s: float
    """The same of the processes that these have started: for shiwu the loaders'."""
    mean_batch: float
    largest_batch: int
    full_batch_ms: float
    """The forward pass of the largest batches, median, beside the loaders; NaN where a system does not tell."""
    dtype: str
    gpu: Load
    stages: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """One backlog, and its answers in the order of the pictures."""

    drained: Drained
    replies: tuple[Reply, ...]


def drain(place: Place, running: Running, *, seconds: float) -> Backlog:
    """Feel for the rate with small backlogs, which also warm everything, then measure one of about so many seconds."""
    rate = _once(place, running, PROBE).drained.per_second
    for length_s in (min(PROBE_S, seconds), seconds):
        count = int(min(MOST, max(LEAST, rate * length_s if rate == rate else LEAST)))  # noqa: PLR0124 perhaps none yet
        backlog = _once(place, running, count)
        rate = backlog.drained.per_second
    return backlog


def _once(place: Place, running: Running, count: int) -> Backlog:
    prefix = f"b{next(_numbers)}"
    messages = traffic.build(place.source.references, count=count, prefix=prefix, lane=place.lane)
    ids = [one.id for one in messages]
    with traffic.listening(place.client) as listener:
        traffic.send(place.client, place.lane, messages)
        listener.wait(1, timeout_s=PATIENCE_S, check=running.check, every_s=0.001)
        with watching(place.folder, prefix) as watch:
            before = running.cpu_s()
            # Seldom: arrivals have their own clock, and each look takes a core away from the model for a moment.
            listener.wait(count, timeout_s=PATIENCE_S, check=running.check, every_s=0.2)
            after, load = running.cpu_s(), watch.since()
        arrivals = [listener.arrivals[job_id] for job_id in ids]
    if left := traffic.missing(place.client, ids):
        raise RuntimeError(f"{left} of {count} jobs have no answer")
    replies = traffic.read(place.client, ids)
    # What came with the first answer, in its batch, belongs to the time before the clock.
    first = replies[int(np.argmin(arrivals))].batch_size or 1
    counted = count - first
    own_s, below_s = (ratio(end - start, counted) for start, end in zip(before, after, strict=True))
    largest = max(one.batch_size or 1 for one in replies)
    full_ms = [one.timing.encode for one in replies if one.batch_size == largest and one.timing.encode]
    rate = ratio(counted, max(arrivals) - min(arrivals))
    rate = rate if counted else float("nan")
    drained = Drained(
        pictures=count,
        per_second=rate,
        own_cpu_s=own_s,
        below_cpu_s=below_s,
        mean_batch=mean_batch(replies),
        largest_batch=largest,
        full_batch_ms=median(full_ms),
        dtype=replies[0].dtype,
        gpu=load,
        stages=stage_times(replies),
    )
    return Backlog(drained, tuple(replies))


def mean_batch(replies: Sequence[Reply]) -> float:
    """Pictures ÷ batches: a batch of n is told of by n answers."""
    return ratio(len(replies), sum(1 / (one.batch_size or 1) for one in replies))


def stage_times(replies: Sequence[Reply]) -> tuple[StageTime, ...]:
    """The means of these answers."""
    return tuple(StageTime(name, float(np.mean([getattr(one.timing, name) for one in replies]))) for name in STAGES)
