"""The batcher: no item lost or doubled, order kept, no batch too large, no waiting when there is work."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract import Lane
from shiwu_worker.stages.batch import INTERACTIVE_PAUSE_S, Batcher


@dataclass(frozen=True)
class Item:
    """An item that waits."""

    number: int
    lane: Lane


@given(
    puts=st.lists(st.lists(st.sampled_from(list(Lane)), max_size=20), max_size=8),
    max_size=st.integers(1, 16),
    share=st.floats(0, 0.9),
    fits=st.lists(st.integers(1, 16), min_size=17, max_size=17),
)
def test_every_item_leaves_once_in_the_order_of_its_lane(
    puts: list[list[Lane]], max_size: int, share: float, fits: list[int]
) -> None:
    """For any sequence of puts, takes of at most `max_size` return all items, each lane in order."""
    batcher: Batcher[Item] = Batcher(
        max_size=max_size, bulk_share=share, fit=lambda waiting: min(waiting, fits[waiting])
    )
    number = 0
    taken: list[Item] = []
    for lanes in puts:
        batcher.put([Item(number + n, lane) for n, lane in enumerate(lanes)])
        number += len(lanes)
        batch = batcher.take(timeout_s=0.0)
        assert len(batch) <= max_size
        assert batch or not len(batcher)
        taken += batch
    while batch := batcher.take(timeout_s=0.0):
        taken += batch
    assert sorted(item.number for item in taken) == list(range(number))
    for lane in Lane:
        numbers = [item.number for item in taken if item.lane is lane]
        assert numbers == sorted(numbers)


def test_interactive_goes_first_and_bulk_keeps_its_share() -> None:
    """A full batch of waiting interactive items still holds the share of bulk."""
    batcher: Batcher[Item] = Batcher(max_size=10, bulk_share=0.2)
    batcher.put([Item(n, Lane.BULK) for n in range(50)])
    batcher.put([Item(n, Lane.INTERACTIVE) for n in range(50)])
    lanes = [item.lane for item in batcher.take(timeout_s=0.0)]
    assert lanes == [Lane.INTERACTIVE] * 8 + [Lane.BULK] * 2


@pytest.mark.parametrize("max_size", [1, 2, 8])
def test_bulk_share_adds_up_over_small_batches(max_size: int) -> None:
    """A tenth of a batch of one is none, but of ten batches it is one, also while interactive items wait."""
    batcher: Batcher[Item] = Batcher(max_size=max_size, bulk_share=0.1)
    batcher.put([Item(n, Lane.BULK) for n in range(1000)])
    batcher.put([Item(n, Lane.INTERACTIVE) for n in range(1000)])
    lanes = [item.lane for _ in range(200 // max_size) for item in batcher.take(timeout_s=0.0)]
    assert len(lanes) == 200
    assert 19 <= lanes.count(Lane.BULK) <= 20


def test_bulk_share_does_not_grow_while_no_bulk_waits() -> None:
    """Otherwise the first bulk items after a quiet day would delay interactive ones."""
    batcher: Batcher[Item] = Batcher(max_size=4, bulk_share=0.5)
    for number in range(20):
        batcher.put([Item(number, Lane.INTERACTIVE)])
        batcher.take(timeout_s=0.0)
    batcher.put([Item(n, Lane.BULK) for n in range(8)])
    batcher.put([Item(n, Lane.INTERACTIVE) for n in range(8)])
    lanes = [item.lane for item in batcher.take(timeout_s=0.0)]
    assert lanes.count(Lane.BULK) == 2


def test_batch_takes_what_fits() -> None:
    """The rest is first in the next batch, which does not wait for more."""
    left: list[tuple[str, int]] = []
    batcher: Batcher[Item] = Batcher(
        max_size=8,
        bulk_share=0.0,
        fit=lambda waiting: 4 if waiting == 5 else waiting,
        on_leave=lambda reason, jobs: left.append((reason, len(jobs))),
    )
    batcher.put([Item(n, Lane.BULK) for n in range(5)])
    assert [item.number for item in batcher.take(timeout_s=0.0)] == [0, 1, 2, 3]
    assert [item.number for item in batcher.take(timeout_s=0.0)] == [4]
    assert left == [("free", 4), ("free", 1)]


def test_batches_follow_the_policy_of_the_encoder() -> None:
    """The policy decides how many waiting items a batch takes, and never more than its largest size."""
    policy = SimpleNamespace(wanted=4, take=lambda waiting: 1 if waiting == 3 else min(4, waiting))
    batcher: Batcher[Item] = Batcher(max_size=64, bulk_share=0.1, full_size=lambda: policy.wanted, fit=policy.take)
    batcher.put([Item(n, Lane.INTERACTIVE) for n in range(7)])
    assert [len(batcher.take(timeout_s=0.0)) for _ in range(3)] == [4, 1, 2]


def test_size_of_a_full_batch_may_change() -> None:
    """While the device is busy a batch leaves at the size that counts as full now; its reason follows it too."""
    left: list[tuple[str, int]] = []
    full = [2]
    batcher: Batcher[Item] = Batcher(
        max_size=8,
        bulk_share=0.0,
        full_size=lambda: full[0],
        fit=lambda waiting: min(waiting, full[0]),
        on_leave=lambda reason, jobs: left.append((reason, len(jobs))),
    )
    batcher.batch_started()
    batcher.put([Item(n, Lane.BULK) for n in range(6)])
    assert len(batcher.take(timeout_s=0.01)) == 2
    full[0] = 5
    assert batcher.take(timeout_s=0.01) == []
    batcher.put([Item(6, Lane.BULK)])
    assert len(batcher.take(timeout_s=0.01)) == 5
    assert left == [("full", 2), ("full", 5)]


def test_bulk_fills_brief_batches_while_interactive_items_come() -> None:
    """An interactive item waits for the batch before its own; without such items bulk has the usual size again."""
    now_s = [100.0]
    batcher: Batcher[Item] = Batcher(
        max_size=64, bulk_share=0.1, full_size=lambda: 32, brief_size=lambda: 8, clock=lambda: now_s[0]
    )
    batcher.put([Item(n, Lane.BULK) for n in range(200)])
    assert len(batcher.take(timeout_s=0.0)) == 64
    batcher.put([Item(200, Lane.INTERACTIVE)])
    assert [len(batcher.take(timeout_s=0.0)) for _ in range(2)] == [8, 8]
    now_s[0] += INTERACTIVE_PAUSE_S
    assert len(batcher.take(timeout_s=0.0)) == 64


def test_interactive_items_fill_more_than_a_brief_batch() -> None:
    """Many interactive items are answered sooner in one large batch than one brief batch after the other."""
    batcher: Batcher[Item] = Batcher(max_size=64, bulk_share=0.1, brief_size=lambda: 8)
    batcher.put([Item(n, Lane.BULK) for n in range(100)])
    batcher.put([Item(100 + n, Lane.INTERACTIVE) for n in range(40)])
    batch = batcher.take(timeout_s=0.0)
    assert (len(batch), sum(item.lane is Lane.BULK for item in batch)) == (40, 4)


def test_single_item_leaves_immediately() -> None:
    """Without linger no item waits for others."""
    batcher: Batcher[Item] = Batcher(max_size=64, bulk_share=0.1)
    batcher.put([Item(0, Lane.BULK)])
    began_s = time.monotonic()
    assert len(batcher.take(timeout_s=30.0)) == 1
    assert time.monotonic() - began_s < 20


def test_linger_ends_when_the_batch_is_full() -> None:
    """A batch that becomes full leaves before the linger is over."""
    batcher: Batcher[Item] = Batcher(max_size=2, bulk_share=0.0, linger_s=30.0)
    batcher.put([Item(0, Lane.BULK)])
    timer = threading.Timer(0.05, lambda: batcher.put([Item(1, Lane.BULK)]))
    timer.start()
    assert len(batcher.take(timeout_s=5.0)) == 2
    timer.join()


def test_close_wakes_a_waiting_take() -> None:
    """The encode thread ends immediately when the pipeline stops."""
    batcher: Batcher[Item] = Batcher(max_size=2, bulk_share=0.0)
    timer = threading.Timer(0.05, batcher.close)
    timer.start()
    assert batcher.take(timeout_s=30.0) == []
    timer.join()


def test_busy_device_gets_only_full_batches() -> None:
    """While a batch is on the device, ready items wait for a full batch; when it is done all of them leave."""
    batcher: Batcher[Item] = Batcher(max_size=3, bulk_share=0.0)
    batcher.batch_started()
    batcher.put([Item(n, Lane.BULK) for n in range(2)])
    assert batcher.take(timeout_s=0.01) == []
    batcher.put([Item(2, Lane.BULK), Item(3, Lane.BULK)])
    assert len(batcher.take(timeout_s=0.01)) == 3
    assert batcher.take(timeout_s=0.01) == []
    batcher.batch_done()
    assert len(batcher.take(timeout_s=0.01)) == 1


def test_reason_of_each_batch_is_reported() -> None:
    """Full, the device was free, or closing; an empty batch is not reported."""
    left: list[tuple[str, int]] = []
    batcher: Batcher[Item] = Batcher(
        max_size=4, bulk_share=0.1, on_leave=lambda reason, jobs: left.append((reason, len(jobs)))
    )
    assert batcher.take(timeout_s=0.0) == []
    batcher.put([Item(n, Lane.BULK) for n in range(6)])
    batcher.take(timeout_s=0.0)
    batcher.take(timeout_s=0.0)
    batcher.batch_started()
    batcher.put([Item(9, Lane.BULK)])
    assert batcher.take(timeout_s=0.0) == []
    batcher.close()
    batcher.take(timeout_s=0.0)
    assert left == [("full", 4), ("free", 2), ("closing", 1)]


def test_take_returns_when_it_is_woken() -> None:
    """Once and with nothing, for other work of its caller; a batch that may leave is returned all the same."""
    batcher: Batcher[Item] = Batcher(max_size=3, bulk_share=0.0)
    batcher.wake()
    assert batcher.take(timeout_s=60.0) == []
    batcher.put([Item(1, Lane.BULK)])
    batcher.wake()
    assert len(batcher.take(timeout_s=60.0)) == 1
    assert batcher.take(timeout_s=0.0) == []


def test_batcher_is_idle_without_items_and_batches() -> None:
    """Neither waits for the device nor is on it."""
    batcher: Batcher[Item] = Batcher(max_size=3, bulk_share=0.0)
    assert batcher.is_idle
    batcher.put([Item(1, Lane.BULK)])
    assert not batcher.is_idle
    batcher.take(timeout_s=0.0)
    assert batcher.is_idle
    batcher.batch_started()
    assert not batcher.is_idle
    batcher.batch_done()
    assert batcher.is_idle


def test_preferred_item_leaves_before_bulk() -> None:
    """As an interactive one; an item that has left, or is interactive already, stays what it is."""
    batcher: Batcher[Item] = Batcher(max_size=2, bulk_share=0.0)
    gone, first, second, preferred = [Item(n, Lane.BULK) for n in range(4)]
    interactive = Item(9, Lane.INTERACTIVE)
    batcher.put([gone])
    assert batcher.take(timeout_s=0.0) == [gone]
    batcher.put([first, second, preferred, interactive])
    batcher.prefer([gone, preferred, interactive])
    assert batcher.take(timeout_s=0.0) == [interactive, preferred]
    assert batcher.take(timeout_s=0.0) == [first, second]
    assert len(batcher) == 0
