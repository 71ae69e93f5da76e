"""Progress of the pipeline, and what limits the throughput of a worker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shiwu_worker.runtime.progress import LoadMeter, LoadReport, Progress
from tests.support.clock import Clock


def test_progress_age_grows_until_the_next_mark() -> None:
    """It begins with the creation."""
    clock = Clock()
    progress = Progress(clock=clock.monotonic)
    clock.now_s += 7
    assert progress.age_s() == 7
    progress.mark()
    assert progress.age_s() == 0


@pytest.mark.parametrize(
    ("idle", "device", "fetch", "decode", "limit"),
    [
        (0.8, 0.1, 0.0, 0.0, "arrivals"),
        (0.0, 0.95, 0.5, 0.4, "device"),
        (0.0, 0.5, 0.6, 0.3, "network"),
        (0.0, 0.5, 0.3, 0.6, "decode"),
        (0.1, 0.5, 0.1, 0.1, "messages"),
    ],
)
def test_load_report_names_the_part_that_limits(
    idle: float, device: float, fetch: float, decode: float, limit: str
) -> None:
    """The part whose time is used up."""
    load = LoadReport(seconds=30, pictures=9, batches=3, idle=idle, device=device, fetch=fetch, decode=decode)
    assert load.limit == limit


def test_load_meter_starts_at_zero_after_each_read() -> None:
    """Shares are of the time since the last read, and never above one."""
    meter = LoadMeter(loader_threads=2)
    meter.encoded(images=3, seconds=100.0)
    meter.loaded(fetch_s=50.0, decode_s=0.0)
    first, second = meter.read(), meter.read()
    assert (first.pictures, first.batches, first.device, first.fetch, first.decode) == (3, 1, 1.0, 1.0, 0.0)
    assert (second.pictures, second.device) == (0, 0.0)


def test_load_between_two_moments_leaves_reads_alone() -> None:
    """Two readers, each with its own moments."""
    meter = LoadMeter(loader_threads=1)
    meter.encoded(images=3, seconds=1.0)
    before = meter.sums()
    meter.encoded(images=4, seconds=1.0)
    meter.idle(0.25)
    until = replace(meter.sums(), at_s=before.at_s + 2.0)
    between = meter.since(before, until=until)
    assert (between.seconds, between.pictures, between.batches, between.device, between.idle) == (2.0, 4, 1, 0.5, 0.125)
    assert meter.read().pictures == 7
