"""Times of a job follow each other and add up, however far the job came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.runtime.progress import LoadMeter, LoadReport

NAMES = ["fetch_from_s", "decode_from_s", "batch_from_s", "encode_from_s", "score_from_s"]


@given(
    st.lists(st.floats(0, 100), min_size=6, max_size=6), st.integers(0, 5), st.none() | st.floats(0, 1000).map(round)
)
def test_the_parts_add_up_to_the_total(steps: list[float], reached: int, queue_ms: float | None) -> None:
    """A job that ended in any stage: the parts are not negative, the sum is the total, later stages took nothing."""
    moments = StageTimestamps(claimed_s=1000.0, queue_ms=queue_ms)
    now_s = 1000.0
    for name, step in zip(NAMES[:reached], steps, strict=False):
        now_s += step
        setattr(moments, name, now_s)
    until_s = now_s + steps[5]
    timing = moments.timing(until_s)
    parts = [timing.claim, timing.fetch, timing.decode, timing.batch, timing.encode, timing.score]
    assert min(parts) >= 0
    assert sum(parts) + (queue_ms or 0) == pytest.approx(timing.total, abs=0.01)
    assert timing.total - (queue_ms or 0) == pytest.approx((until_s - 1000.0) * 1000, abs=0.05)
    assert all(part == 0 for part in parts[reached + 1 :])


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
def test_a_load_says_what_limits(idle: float, device: float, fetch: float, decode: float, limit: str) -> None:
    """The one whose time is used up."""
    load = LoadReport(seconds=30, pictures=9, batches=3, idle=idle, device=device, fetch=fetch, decode=decode)
    assert load.limit == limit


def test_the_meter_starts_anew_with_each_read() -> None:
    """Shares are of the time since the last read, and never above one."""
    meter = LoadMeter(loader_threads=2)
    meter.encoded(pictures=3, seconds=100.0)
    meter.loaded(fetch_s=50.0, decode_s=0.0)
    first, second = meter.read(), meter.read()
    assert (first.pictures, first.batches, first.device, first.fetch, first.decode) == (3, 1, 1.0, 1.0, 0.0)
    assert (second.pictures, second.device) == (0, 0.0)
