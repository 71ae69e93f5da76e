"""The crew: who does what with how many cores, what comes back, and what is left of it."""

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
from shiwu_worker.stages.encode.tuning.thread_policy import MAX_DIVIDED
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def doubled(raw: torch.Tensor) -> torch.Tensor:
    """A tower of a kind: (n, 2) → (n, 2)."""
    return raw * 2


def names() -> list[str]:
    """Of the crews' threads."""
    return [one.name for one in threading.enumerate() if one.name.startswith(("captain", "crew"))]


@given(rung=st.integers(1, 512), threads=st.integers(2, MAX_DIVIDED))
def test_parts_are_of_one_size_and_use_most_threads(rung: int, threads: int) -> None:
    """As many as there can be; one where half of the threads would be idle."""
    crew = CpuInferencePool.__new__(CpuInferencePool)
    crew.threads, crew.is_divided = threads, True
    parts = crew.parts_of(rung)
    assert rung % parts == 0
    assert parts <= threads
    assert parts == 1 or parts > threads / 2
    assert all(rung % more or more > threads for more in range(parts + 1, rung + 1)) or parts == 1


def test_each_thread_has_its_own_number_of_cores() -> None:
    """The captain all of them, the others one, from their first operator on; threads to come what was asked for."""
    crew = CpuInferencePool(3, is_divided=True)
    seen: list[tuple[str, int]] = []

    def tower(raw: torch.Tensor) -> torch.Tensor:
        seen.append((threading.current_thread().name.split("-")[0], torch.get_num_threads()))
        return raw

    for pictures in (6, 1):
        crew.start(tower, torch.zeros(pictures, 2), torch.zeros(pictures, 2)).wait()
    assert sorted(seen) == [("captain", 3), *[("crew", 1)] * 3]
    assert crew.call(torch.get_num_threads) == 3
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join(10)
    assert [torch.get_num_threads(), *fresh] == [3, 3]


@pytest.mark.parametrize("is_divided", [True, False])
def test_rows_come_back_in_their_order(*, is_divided: bool) -> None:
    """Many batches, one after the other and of all sizes."""
    crew = CpuInferencePool(2, is_divided=is_divided)
    raws = [torch.arange(2.0 * size).view(size, 2) for size in (1, 2, 4, 8, 3, 6)]
    works = [(crew.start(doubled, raw, vectors := torch.zeros_like(raw)), raw, vectors) for raw in raws]
    for work, raw, vectors in works:
        work.wait()
        assert torch.equal(vectors, raw * 2)


def test_another_batch_begins_beside_a_part_that_is_held_up() -> None:
    """`start` returns when a thread is idle, and what that one does waits for nobody."""
    crew = CpuInferencePool(2, is_divided=True)
    go = threading.Event()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        if raw[0, 0] == 1:
            go.wait(30)
        return raw * 2

    raw = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    held, vectors = crew.start(tower, raw, first := torch.zeros(2, 2)), torch.zeros(1, 2)
    crew.is_divided = False
    crew.start(doubled, torch.ones(1, 2), vectors).wait()
    assert torch.equal(vectors, torch.full((1, 2), 2.0))
    go.set()
    held.wait()
    assert torch.equal(first, raw * 2)


def test_no_more_than_its_threads_at_a_time() -> None:
    """With all of them busy `start` waits."""
    crew = CpuInferencePool(2, is_divided=True)
    go, running = threading.Event(), threading.Semaphore(0)

    def tower(raw: torch.Tensor) -> torch.Tensor:
        running.release()
        go.wait(30)
        return raw

    starter = threading.Thread(target=crew.start, args=(tower, torch.zeros(4, 2), torch.zeros(4, 2)))
    starter.start()
    assert all(running.acquire(timeout=30) for _ in range(2))
    assert starter.is_alive()
    go.set()
    starter.join(30)
    assert not starter.is_alive()


@pytest.mark.parametrize("rows", [4, 1])
def test_an_error_comes_out_when_all_parts_are_done(rows: int) -> None:
    """The one that was raised; the crew goes on."""
    crew = CpuInferencePool(2, is_divided=True)
    failed = threading.Event()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        if raw[0, 0] == 0:
            failed.set()
            raise MemoryError("no room")
        failed.wait(30)
        for _ in range(200):  # the other part is over long before this one
            torch.ones(1000, 1000).sum()
        return raw * 2

    raw = torch.arange(2.0 * rows).view(rows, 2)
    vectors = torch.zeros_like(raw)
    work = crew.start(tower, raw, vectors)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            work.wait()
    assert torch.equal(vectors[2:], raw[2:] * 2)
    crew.start(doubled, raw, vectors).wait()
    assert torch.equal(vectors, raw * 2)
    with pytest.raises(ZeroDivisionError):
        crew.call(lambda: 1 / 0)


def test_fewer_threads_work_on_a_batch_when_asked_to() -> None:
    """The captain's, from its next batch on, and all of them again; a batch says how many there were."""
    crew, seen = CpuInferencePool(3), list[int]()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return raw

    for count in (3, 1, 3):
        crew.omp_threads = count
        spent = crew.start(tower, torch.zeros(2, 2), torch.zeros(2, 2)).wait()
        assert spent.omp_threads == count
    assert seen == [3, 1, 3]


@pytest.mark.parametrize("is_divided", [True, False])
def test_a_batch_says_what_it_took(*, is_divided: bool) -> None:
    """CPU of the threads that ran it, by which waiting costs nothing, and time from its first part on."""

    def tower(raw: torch.Tensor) -> torch.Tensor:
        until_s = time.thread_time() + 0.05
        while time.thread_time() < until_s:
            pass
        threading.Event().wait(0.2)
        return raw

    spent = CpuInferencePool(2, is_divided=is_divided).start(tower, torch.zeros(2, 2), torch.zeros(2, 2)).wait()
    # Each part for itself; or the time of the one who leads, for each of those who work with it.
    assert 0.1 <= spent.cost < 0.18
    assert spent.seconds >= 0.25
    assert spent.omp_threads == (0 if is_divided else 2)


@pytest.mark.parametrize(("threads", "is_divided", "count"), [(2, True, 3), (2, False, 1), (1, True, 1)])
def test_its_threads_end_with_it(threads: int, count: int, *, is_divided: bool) -> None:
    """One for each part where batches are divided, and the captain."""
    gc.collect()
    wait_until(lambda: not names(), timeout_s=30, what="the end of other tests' crews")
    crew = CpuInferencePool(threads, is_divided=is_divided)
    assert len(names()) == count
    crew.start(doubled, torch.zeros(8, 2), torch.zeros(8, 2)).wait()
    del crew
    gc.collect()
    wait_until(lambda: not names(), timeout_s=30, what="the end of the threads")
