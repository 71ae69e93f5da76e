"""Sends jobs at fixed moments, whether or not earlier jobs are answered: an open loop.

Latency counts from the moment at which a job was due, not from when it was sent. So a system that stalls does not get
fewer jobs, and a sender that stalls makes no answer look quick (no coordinated omission).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench import traffic
from bench.backlog import StageTime, mean_batch, stage_times
from bench.picture_systems import Place, Running
from bench.report import median

WARM_SHARE: Final = 0.1
"""The first answers of a run, while queues fill, are not counted."""
BUILD_S: Final = 0.5
BUILD_ONE_S: Final = 0.0001
"""Time until the first job is due, to build the messages."""
DRAIN_S: Final = 60.0
MAX_LATE_S: Final = 1.0
MAX_MAX_LATE_SHARE: Final = 0.1
_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Spread:
    """Latencies of one run, ms."""

    rate: float
    """Jobs per second that were due."""
    answers: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    sender_late_p99_ms: float
    """How late the sender was; included in the latencies above."""
    kept_up: bool
    """Whether the last answer came soon after the last job."""
    mean_batch: float
    slowest: tuple[StageTime, ...]
    """Mean stage times of the slowest twentieth, as far as the system reports them."""


def run_open_loop(place: Place, running: Running, *, rate: float, seconds: float, seed: int) -> Spread:
    """Send jobs with Poisson arrivals of this rate for `seconds`; return the latencies."""
    chance = np.random.default_rng([seed, int(rate * 1000)])
    count = max(2, int(rate * seconds))
    due_s = np.cumsum(chance.exponential(1 / rate, count))
    prefix = f"l{next(_numbers)}"
    began_s = time.monotonic() + BUILD_S + count * BUILD_ONE_S
    after_s = [float(each) for each in due_s + began_s - time.monotonic()]
    messages = traffic.build(place.source.references, count=count, prefix=prefix, lane=place.lane, after_s=after_s)
    ids = [message.id for message in messages]
    with traffic.listening(place.client) as listener:
        late = send_when_due(place, messages, due_s + began_s)
        running.check()
        listener.wait(count, timeout_s=DRAIN_S + seconds, check=running.check)
        arrivals = np.array([listener.arrivals[job_id] for job_id in ids])
    warm = int(count * WARM_SHARE)
    replies = traffic.read(place.client, ids)[warm:]
    latencies = ((arrivals - began_s - due_s) * 1000)[warm:]
    p50, p95, p99 = (float(np.percentile(latencies, share)) for share in (50, 95, 99))
    over_s = float(arrivals.max() - began_s - due_s[-1])
    kept_up = over_s <= max(MAX_LATE_S, MAX_MAX_LATE_SHARE * float(due_s[-1]))
    late_ms = float(np.percentile(late, 99) * 1000)
    slow = [reply for reply, latency in zip(replies, latencies, strict=True) if latency >= p95]
    return Spread(
        rate=rate,
        answers=len(latencies),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(latencies.max()),
        sender_late_p99_ms=late_ms,
        kept_up=kept_up,
        mean_batch=mean_batch(replies),
        slowest=(StageTime("queue", mean([reply.timing.queue or 0.0 for reply in slow])), *stage_times(slow)),
    )


def send_when_due(place: Place, messages: Sequence[traffic.Message], at_s: NDArray[np.float64]) -> list[float]:
    """Send each message when it is due, together with others that are due; return how late each was, in seconds."""
    late: list[float] = []
    while (sent := len(late)) < len(messages):
        if (left_s := at_s[sent] - time.monotonic()) > 0:
            time.sleep(left_s)  # until the next one is due: an open loop waits for no answer
        until = int(np.searchsorted(at_s, time.monotonic(), side="right"))
        traffic.send(place.client, place.lane, messages[sent:until])
        now_s = time.monotonic()
        late += [now_s - due_s for due_s in at_s[sent:until]]
    return late


@dataclass(frozen=True, slots=True)
class Idle:
    """One image at a time on an idle worker, medians in ms."""

    answers: int
    total_ms: float
    compute_ms: float
    """Time of the stages as reported in the answer: fetch, decode, encode, score."""
    above_ms: float
    """Total minus compute for each image: messages, waiting, and passing between stages."""
    above_p95_ms: float


def run_idle(place: Place, running: Running, *, count: int, seed: int) -> Idle:
    """Send one job, wait for its answer, pause, and repeat."""
    chance = np.random.default_rng(seed)
    prefix = f"i{next(_numbers)}"
    messages = traffic.build(place.source.references, count=count, prefix=prefix, lane=place.lane)
    took_ms: list[float] = []
    with traffic.listening(place.client) as listener:
        for number, message in enumerate(messages, 1):
            time.sleep(chance.uniform(0.02, 0.06))  # a random pause, so that no timer runs in step
            began_s = time.monotonic()
            traffic.send(place.client, place.lane, [message])
            listener.wait(number, timeout_s=DRAIN_S, check=running.check, every_s=0.001)
            took_ms.append((listener.arrivals[message.id] - began_s) * 1000)
    replies = traffic.read(place.client, [message.id for message in messages])
    stages = [reply.timing.fetch + reply.timing.decode + reply.timing.encode + reply.timing.score for reply in replies]
    above = [total - own for total, own in zip(took_ms, stages, strict=True)]
    return Idle(count, median(took_ms), median(stages), median(above), float(np.percentile(above, 95)))
