"""Images a second from a backlog, in steady state: from the first answer to the last one."""

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

PROBE_JOBS: Final = 4
MIN_JOBS: Final = 12
MAX_JOBS: Final = 500_000
PROBE_S: Final = 2.0
ANSWER_TIMEOUT_S: Final = 600.0
STAGES: Final = tuple(stage.value for stage in Stage if stage is not Stage.COMMIT)
"""Commit comes after the answer is written, so no answer has its time."""
_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class StageTime:
    """Mean milliseconds of an image in one stage."""

    stage: str
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Drained:
    """Figures of one backlog."""

    pictures: int
    per_second: float
    own_cpu_s: float
    """CPU seconds per image in the system's own processes: for shiwu the worker, with the model."""
    below_cpu_s: float
    """CPU seconds per image in the processes that these started: for shiwu the loaders."""
    mean_batch: float
    largest_batch: int
    full_batch_ms: float
    """Median forward pass of the largest batches while loaders run; NaN where a system does not report it."""
    dtype: str
    gpu: Load
    stages: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """One drained backlog, and its answers in the order of the images."""

    drained: Drained
    replies: tuple[Reply, ...]


def drain(place: Place, running: Running, *, seconds: float) -> Backlog:
    """Estimate the rate with small backlogs, which also warm all parts, then measure one of about `seconds`."""
    rate = _drain_once(place, running, PROBE_JOBS).drained.per_second
    for length_s in (min(PROBE_S, seconds), seconds):
        count = int(min(MAX_JOBS, max(MIN_JOBS, rate * length_s if rate == rate else MIN_JOBS)))  # noqa: PLR0124 perhaps none yet
        backlog = _drain_once(place, running, count)
        rate = backlog.drained.per_second
    return backlog


def _drain_once(place: Place, running: Running, count: int) -> Backlog:
    prefix = f"b{next(_numbers)}"
    messages = traffic.build(place.source.references, count=count, prefix=prefix, lane=place.lane)
    ids = [message.id for message in messages]
    with traffic.listening(place.client) as listener:
        traffic.send(place.client, place.lane, messages)
        listener.wait(1, timeout_s=ANSWER_TIMEOUT_S, check=running.check, every_s=0.001)
        with watching(place.folder, prefix) as watch:
            before = running.cpu_s()
            # Seldom: arrivals are timed by the listener, and each check takes a core from the model for a moment.
            listener.wait(count, timeout_s=ANSWER_TIMEOUT_S, check=running.check, every_s=0.2)
            after, load = running.cpu_s(), watch.since()
        arrivals = [listener.arrivals[job_id] for job_id in ids]
    if left := traffic.missing(place.client, ids):
        raise RuntimeError(f"{left} of {count} jobs have no answer")
    replies = traffic.read(place.client, ids)
    # The batch of the first answer was computed before the clock started.
    first = replies[int(np.argmin(arrivals))].batch_size or 1
    counted = count - first
    own_s, below_s = (ratio(end - start, counted) for start, end in zip(before, after, strict=True))
    largest = max(reply.batch_size or 1 for reply in replies)
    full_ms = [reply.timing.encode for reply in replies if reply.batch_size == largest and reply.timing.encode]
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
    """Return images ÷ batches: a batch of n images appears in n answers."""
    return ratio(len(replies), sum(1 / (reply.batch_size or 1) for reply in replies))


def stage_times(replies: Sequence[Reply]) -> tuple[StageTime, ...]:
    """Return the mean time of each stage over these answers."""
    return tuple(StageTime(name, float(np.mean([getattr(reply.timing, name) for reply in replies]))) for name in STAGES)
