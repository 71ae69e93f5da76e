"""What a worker tells of itself: rates of the last ten seconds, at most once a second."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.broker.worker_state import WorkerState
from shiwu.contract import LabelsInfo
from shiwu_worker.runtime.progress import LoadMeter, LoadSums
from shiwu_worker.service.worker_reporter import WorkerReporter


class Meter(LoadMeter):
    """A meter whose clock is the test's."""

    now_s = 100.0

    def sums(self) -> LoadSums:
        """The sums at the test's time."""
        return replace(super().sums(), at_s=self.now_s)


class Reported:
    """A reporter of a worker with two loaders, and what it wrote."""

    def __init__(self, gpu: tuple[int, int] | None = None) -> None:
        self.meter = Meter(loader_threads=1)
        self.held: list[str] = []
        self.states: list[WorkerState] = []
        loaders: Any = SimpleNamespace(pids=[1, 2], restarts=3)
        encoder: Any = SimpleNamespace(gpu_memory=lambda: gpu, size_policy=SimpleNamespace(largest=64))
        self.reporter = WorkerReporter(
            self.states.append,
            WorkerState(version="9", model="m", slots=128),
            labels=lambda: LabelsInfo(name="mine", digest="d", count=1, head="softmax"),
            meter=self.meter,
            in_flight=self.held,
            loaders=loaders,
            encoder=encoder,
            clock=lambda: self.meter.now_s,
        )

    def after(self, seconds: float) -> WorkerState:
        """The newest state after so much time."""
        self.meter.now_s += seconds
        self.reporter.publish()
        return self.states[-1]


def test_state_holds_fixed_and_measured_fields() -> None:
    """Of a GPU: reserved and total memory."""
    reported = Reported(gpu=(5, 8))
    reported.held += ["a", "b"]
    reported.meter.encoded(images=40, seconds=1.0)
    reported.meter.encoded(images=20, seconds=1.0)
    state = reported.after(4.0)
    assert (state.labels, state.labels_digest) == ("mine", "d")
    assert (state.version, state.model, state.slots, state.uptime_s) == ("9", "m", 128, 4.0)
    assert (state.images_per_s, state.batch, state.max_batch, state.device_share) == (15.0, 30.0, 64, 0.5)
    assert (state.in_flight, state.loaders, state.loader_restarts) == (2, 2, 3)
    assert (state.memory_bytes, state.memory_total_bytes) == (5, 8)


def test_rate_forgets_what_is_older_than_ten_seconds() -> None:
    reported = Reported()
    reported.meter.encoded(images=100, seconds=0.1)
    assert reported.after(1.0).images_per_s == 100.0
    rates = [reported.after(1.0).images_per_s for _ in range(12)]
    assert rates[8] == 10.0
    assert rates[-1] == 0.0


def test_states_are_written_once_a_second_at_most() -> None:
    """Ticks of a short lease come more often; those that come a little early count."""
    reported = Reported()
    for _ in range(10):
        reported.after(0.2)
    assert len(reported.states) == 4
    reported.after(0.95)
    assert len(reported.states) == 5


def test_worker_on_a_cpu_tells_its_resident_memory() -> None:
    state = Reported().after(1.0)
    assert state.memory_bytes > 1 << 20
    assert state.memory_total_bytes == 0
    assert (state.images_per_s, state.batch) == (0.0, 0.0)


def test_an_error_of_redis_reaches_the_heartbeat() -> None:
    """Which logs it and tries again in the next tick."""
    reported = Reported()

    def write(_: WorkerState) -> None:
        raise ConnectionError

    reported.reporter._write = write
    with pytest.raises(ConnectionError):
        reported.reporter.publish()
