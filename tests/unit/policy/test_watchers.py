"""Which workers watch which shards."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.policy.watchers import round_pause_s, watchers_of

SHARDS = range(16)
WORKERS = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=30)
COUNTS = st.integers(min_value=1, max_value=4)


@given(workers=WORKERS, count=COUNTS)
def test_each_shard_has_as_many_watchers_as_it_can(workers: set[str], count: int) -> None:
    """Different ones, and the same whatever the order of the names."""
    for shard in SHARDS:
        found = watchers_of(shard, workers, count=count)
        assert len(set(found)) == len(found) == min(count, len(workers))
        assert found == watchers_of(shard, sorted(workers, reverse=True), count=count)


@given(workers=WORKERS, count=COUNTS, data=st.data())
def test_worker_that_leaves_changes_its_shards_only(workers: set[str], count: int, data: st.DataObject) -> None:
    """In these one other worker takes its place; the others stay, as they do when one joins."""
    gone = data.draw(st.sampled_from(sorted(workers)))
    for shard in SHARDS:
        before = watchers_of(shard, workers, count=count)
        after = watchers_of(shard, workers - {gone}, count=count)
        if gone in before:
            assert set(before) - {gone} <= set(after)
            assert len(set(after) - set(before)) == (len(workers) > count)
        else:
            assert after == before


@pytest.mark.parametrize(("workers", "count"), [(4, 2), (10, 2), (100, 2), (16, 1)])
def test_shards_are_spread_over_the_workers(workers: int, count: int) -> None:
    """With 64 shards no worker has more than four times its share, or eight where that is little."""
    names = [f"host-{number}" for number in range(workers)]
    watched = Counter(name for shard in range(64) for name in watchers_of(shard, names, count=count))
    assert watched.total() == 64 * count
    assert max(watched.values()) <= max(8, 4 * 64 * count / workers)
    # As for a random choice, of which a share (1 - 1 / workers) ** (64 * count) gets nothing.
    assert len(watched) >= 0.5 * min(workers, 64 * count)


def test_rounds_of_all_workers_are_bounded() -> None:
    """Each looks every 50 ms, and less often where there are many."""
    assert round_pause_s(1) == round_pause_s(8) == 0.05
    assert all(workers / round_pause_s(workers) <= 170 for workers in range(1, 1000))
