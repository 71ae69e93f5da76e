"""Times of a job follow each other and add up, however far the job came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.jobs.timestamps import StageTimestamps

NAMES = ["fetch_from_s", "decode_from_s", "batch_from_s", "encode_from_s", "score_from_s"]


@given(
    st.lists(st.floats(0, 100), min_size=6, max_size=6), st.integers(0, 5), st.none() | st.floats(0, 1000).map(round)
)
def test_stage_times_add_up_to_the_total(steps: list[float], reached: int, queue_ms: float | None) -> None:
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
