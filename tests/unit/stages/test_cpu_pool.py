"""The CPU pool: which thread runs what with how many cores, what it returns, and how it ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool
from shiwu_worker.stages.encode.tuning.thread_policy import MAX_SPLIT_THREADS
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def doubled(raw: torch.Tensor) -> torch.Tensor:
    """A simple tower: (n, 2) → (n, 2)."""
    return raw * 2


def pool_threads() -> set[threading.Thread]:
    """The threads of all pools, also those of models that other tests share."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("encode-")}


@given(size=st.integers(1, 512), threads=st.integers(2, MAX_SPLIT_THREADS))
def test_parts_are_equal_and_use_most_threads(size: int, threads: int) -> None:
    """As many parts as possible; one if half of the threads would be idle."""
    pool = CpuInferencePool.__new__(CpuInferencePool)
    pool.threads, pool.splits_batches = threads, True
    parts = pool.split_count(size)
    assert size % parts == 0
    assert parts <= threads
    assert parts == 1 or parts > threads / 2
    assert all(size % more or more > threads for more in range(parts + 1, size + 1)) or parts == 1


def test_each_thread_has_its_own_number_of_cores() -> None:
    """The exclusive thread has all, the others one, from their first operator on; later threads have all."""
    pool = CpuInferencePool(3, splits_batches=True)
    seen: list[tuple[str, int]] = []

    def tower(raw: torch.Tensor) -> torch.Tensor:
        seen.append((threading.current_thread().name.rstrip("-012"), torch.get_num_threads()))
        return raw

    for images in (6, 1):
        pool.submit(tower, torch.zeros(images, 2), torch.zeros(images, 2)).wait()
    assert sorted(seen) == [("encode-exclusive", 3), *[("encode-part", 1)] * 3]
    assert pool.run_exclusive(torch.get_num_threads) == 3
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join(10)
    assert [torch.get_num_threads(), *fresh] == [3, 3]


@pytest.mark.parametrize("splits_batches", [True, False])
def test_rows_keep_their_order(*, splits_batches: bool) -> None:
    """Several batches of different sizes, one after the other."""
    pool = CpuInferencePool(2, splits_batches=splits_batches)
    raws = [torch.arange(2.0 * size).view(size, 2) for size in (1, 2, 4, 8, 3, 6)]
    works = [(pool.submit(doubled, raw, vectors := torch.zeros_like(raw)), raw, vectors) for raw in raws]
    for work, raw, vectors in works:
        work.wait()
        assert torch.equal(vectors, raw * 2)


def test_next_batch_begins_while_a_part_is_delayed() -> None:
    """`submit` returns when a thread is idle, and the next batch does not wait for the delayed part."""
    pool = CpuInferencePool(2, splits_batches=True)
    go = threading.Event()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        if raw[0, 0] == 1:
            go.wait(30)
        return raw * 2

    raw = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    held, vectors = pool.submit(tower, raw, first := torch.zeros(2, 2)), torch.zeros(1, 2)
    pool.splits_batches = False
    pool.submit(doubled, torch.ones(1, 2), vectors).wait()
    assert torch.equal(vectors, torch.full((1, 2), 2.0))
    go.set()
    held.wait()
    assert torch.equal(first, raw * 2)


def test_submit_waits_while_all_threads_are_busy() -> None:
    """`submit` waits while all threads are busy."""
    pool = CpuInferencePool(2, splits_batches=True)
    go, running = threading.Event(), threading.Semaphore(0)

    def tower(raw: torch.Tensor) -> torch.Tensor:
        running.release()
        go.wait(30)
        return raw

    starter = threading.Thread(target=pool.submit, args=(tower, torch.zeros(4, 2), torch.zeros(4, 2)))
    starter.start()
    assert all(running.acquire(timeout=30) for _ in range(2))
    assert starter.is_alive()
    go.set()
    starter.join(30)
    assert not starter.is_alive()


@pytest.mark.parametrize("rows", [4, 1])
def test_error_is_raised_when_all_parts_are_done(rows: int) -> None:
    """The error that was raised; the pool keeps working."""
    pool = CpuInferencePool(2, splits_batches=True)
    failed = threading.Event()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        if raw[0, 0] == 0:
            failed.set()
            raise MemoryError("no room")
        failed.wait(30)
        for _ in range(200):  # the failing part ends long before this one
            torch.ones(1000, 1000).sum()
        return raw * 2

    raw = torch.arange(2.0 * rows).view(rows, 2)
    vectors = torch.zeros_like(raw)
    work = pool.submit(tower, raw, vectors)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            work.wait()
    assert torch.equal(vectors[2:], raw[2:] * 2)
    pool.submit(doubled, raw, vectors).wait()
    assert torch.equal(vectors, raw * 2)
    with pytest.raises(ZeroDivisionError):
        pool.run_exclusive(lambda: 1 / 0)


def test_fewer_threads_run_a_batch_when_set() -> None:
    """The OpenMP threads of the exclusive thread change from its next batch on; the batch reports their number."""
    pool, seen = CpuInferencePool(3), list[int]()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return raw

    for count in (3, 1, 3):
        pool.omp_threads = count
        spent = pool.submit(tower, torch.zeros(2, 2), torch.zeros(2, 2)).wait()
        assert spent.omp_threads == count
    assert seen == [3, 1, 3]


@pytest.mark.parametrize("splits_batches", [True, False])
def test_batch_reports_its_cost_and_time(*, splits_batches: bool) -> None:
    """The CPU time of its threads, without waiting, and the elapsed time since its first part began."""

    def tower(raw: torch.Tensor) -> torch.Tensor:
        until_s = time.thread_time() + 0.05
        while time.thread_time() < until_s:
            pass
        threading.Event().wait(0.2)
        return raw

    spent = (
        CpuInferencePool(2, splits_batches=splits_batches).submit(tower, torch.zeros(2, 2), torch.zeros(2, 2)).wait()
    )
    # The sum over the parts; or the CPU time of the leading thread, times the number of threads.
    assert 0.1 <= spent.cost < 0.18
    assert spent.seconds >= 0.25
    assert spent.omp_threads == (0 if splits_batches else 2)


@pytest.mark.parametrize(("threads", "splits_batches", "count"), [(2, True, 3), (2, False, 1), (1, True, 1)])
def test_threads_end_with_the_pool(threads: int, count: int, *, splits_batches: bool) -> None:
    """One thread per part if batches are split, and the exclusive thread."""
    before = pool_threads()
    pool = CpuInferencePool(threads, splits_batches=splits_batches)
    threads_of_pool = pool_threads() - before
    assert len(threads_of_pool) == count
    pool.submit(doubled, torch.zeros(8, 2), torch.zeros(8, 2)).wait()
    del pool
    gc.collect()
    wait_until(lambda: not threads_of_pool & pool_threads(), timeout_s=30, what="the end of the threads")
