"""Which batch sizes follow from how long each takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.stages.encode.batch_sizes import MAX_ROUNDS, plan_batches, time_batch_sizes

# As measured: the embedded model on two cores, and a shape as a GPU has it.
BY_THE_PICTURE = {1: 5.6, 2: 7.7, 4: 11.6, 8: 19.8, 16: 37.3}
FLAT = {1: 1.5, 2: 1.5, 4: 1.6, 8: 1.8, 16: 2.2}


def test_batches_with_cost_per_image_are_hardly_padded() -> None:
    """Five are four and one, six four and two, three and seven are padded by one."""
    sizes = plan_batches(BY_THE_PICTURE)
    assert sizes[:9] == (0, 1, 2, 3, 4, 4, 4, 7, 8)
    assert sizes[9] == 8
    assert sizes[12] == 8
    assert sizes[15:] == (15, 16)


def test_batches_of_equal_cost_take_all_images() -> None:
    """Padding is free there."""
    assert plan_batches(FLAT) == tuple(range(17))


def test_sizes_need_not_include_one() -> None:
    """An operator's one size, and no smaller one: everything is padded to it."""
    assert plan_batches({4: 1.0}) == (0, 1, 2, 3, 4)


def test_sizes_take_turns_while_they_are_measured() -> None:
    """A machine that is slow from the fourth run on changes no ratio: each size had its best in the quick time."""
    slow_from, runs = 4, list[int]()

    def run(size: int) -> float:
        runs.append(size)
        return 0.01 * (1 + size) * (1.5 if len(runs) > slow_from else 1)

    seconds = time_batch_sizes(run, (1, 2, 4), is_enough=lambda _: False)
    assert runs == [1, 2, 4] * (1 + MAX_ROUNDS)
    assert seconds == pytest.approx({1: 0.02, 2: 0.03, 4: 0.05})


def test_timing_ends() -> None:
    """Passes of a second are run once, the others until that has taken long enough; no size beyond enough is tried."""
    runs: list[int] = []

    def run(size: int) -> float:
        runs.append(size)
        return 0.6 * size

    time_batch_sizes(run, (1, 2, 4), is_enough=lambda seconds: max(seconds) == 2)
    assert runs == [1, 2, 1, 1]


@given(
    seconds=st.dictionaries(st.sampled_from([1, 2, 3, 4, 8, 16]), st.floats(0.001, 10), min_size=1),
    waiting=st.integers(0, 16),
)
def test_plan_is_never_slower_than_one_batch(seconds: dict[int, float], waiting: int) -> None:
    """Whatever the device: the batches that follow each other take no longer than one that is padded."""
    sizes = plan_batches(seconds)
    waiting = min(waiting, len(sizes) - 1)
    padded_s = next(seconds[size] for size in sorted(seconds) if size >= waiting) if waiting else 0.0
    took_s, left = 0.0, waiting
    while left:
        taken = sizes[left]
        assert 0 < taken <= left
        took_s += next(seconds[size] for size in sorted(seconds) if size >= taken)
        left -= taken
    assert took_s <= padded_s * (1 + 1e-9)
