"""The stand-in device of `bench lock-budget` and the frames of its loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench.lock_budget import Device, _measure, idle_share
from bench.standin import StandInEncoder

from tests.support.servers import Valkey

PIXELS = np.zeros((64, 1), np.uint8)


def test_device_takes_the_time_of_its_batches() -> None:
    """64 images in 6.4 ms are 10,000 a second; at 80 % of the load the device is slower, so that it can be reached."""
    device = Device(batch=64, batch_ms=6.4, load=0.8)
    assert device.per_second == pytest.approx(8000)
    per_picture_ms, per_batch_ms = device.costs_ms
    assert 64 * per_picture_ms + per_batch_ms == pytest.approx(8.0)


def test_time_between_batches_counts_as_idle() -> None:
    """But not the time beside a canary, when no job waits, nor batches that are queued behind one another."""
    now_s = 100.0
    encoder = StandInEncoder(batch_sizes=(64,), per_picture_ms=0.0, per_batch_ms=10.0, clock=lambda: now_s)
    encoder.encode(PIXELS[:1])
    now_s = 105.0
    for _ in range(3):
        encoder.launch(PIXELS, range(64))
    assert encoder.idle_s == 0
    now_s = 105.04
    encoder.launch(PIXELS, range(64))
    assert encoder.idle_s == pytest.approx(0.01)
    assert encoder.busy_s == pytest.approx(0.05)
    assert idle_share(0.09, 0.01) == pytest.approx(0.1)


@pytest.mark.parametrize("loaders", [0, 1])
def test_worker_answers_every_job_in_front_of_the_device(tmp_path: Path, loaders: int) -> None:
    """With frames of loaders and without; the figures say nothing on a machine that tests share."""
    with Valkey(folder=tmp_path / "valkey") as server:
        found = _measure(server, Device(batch=8, batch_ms=1.0, load=1.0), loaders=loaders, jobs=200)
    assert found["answered"] == 200
    assert found["device_busy_s"] >= 200 / 8 * 0.001 * 0.9
    assert found["cpu_seconds"] > 0
    assert found["device_idle_s"] >= 0
