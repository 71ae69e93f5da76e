"""The threads on which a model runs on a CPU of several cores.

OpenMP keeps a team of threads for each thread that has used it. If the teams together have more threads than there are
cores, waiting threads sleep instead of spinning, and short steps take twice as long. So all work that uses every core
runs on one thread, the exclusive thread.

A large batch is split: each thread works on its own part, with one core. If all cores worked together on each step of
the model, the fastest would wait for the slowest at each step, so a core taken by a loader would slow all of them. A
split batch has no such steps: a thread that was held up delays no other, and a thread that is done begins the next
batch.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import torch

from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.stages.encode.towers import Tower

T = TypeVar("T")
START_TIMEOUT_S: Final = 60.0
_Task = Callable[[], None]
_Tasks = queue.SimpleQueue[_Task | None]


@dataclass(frozen=True, slots=True)
class Spent:
    """What a batch took.

    Args:
        cost: seconds of a GPU; on a CPU, core-seconds of the threads that ran the model, which other programs
            lengthen far less than elapsed time.
        seconds: elapsed time since the first part began.
        omp_threads: OpenMP threads that ran the batch as a whole; 0 if it was split.
    """

    cost: float
    seconds: float
    omp_threads: int = 0


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of the tower: OpenMP threads, CPU seconds of the thread that leads them, and times."""

    omp_threads: int
    cpu_s: float
    began_s: float
    ended_s: float


class BatchTask:
    """One batch in the pool: its parts, which run on different threads."""

    def __init__(self, parts: Sequence[Future[_Pass]]) -> None:
        self._parts = tuple(parts)

    def wait(self) -> Spent:
        """Wait for all parts; raises the error of the first part that failed."""
        wait(self._parts)  # also after a failure: the other parts still write to memory that another batch will use
        passes = [part.result() for part in self._parts]
        return Spent(
            cost=sum(run.omp_threads * run.cpu_s for run in passes),
            seconds=max(run.ended_s for run in passes) - min(run.began_s for run in passes),
            omp_threads=passes[0].omp_threads if len(passes) == 1 else 0,
        )


class CpuInferencePool:
    """One exclusive thread for work that uses all cores, and one single-core thread per part of a split batch.

    All are daemon threads. They end when the pool is garbage-collected.

    Args:
        threads: how many; also the number of torch's threads from now on.
        splits_batches: split batches if their size allows it; otherwise the exclusive thread runs all of them.
    """

    def __init__(self, threads: int, *, splits_batches: bool = False) -> None:
        self.threads = threads
        self.splits_batches = splits_batches and threads > 1
        self.omp_threads = threads
        """OpenMP threads of the exclusive thread, from its next batch on: all, or fewer if other programs run."""
        self._part_tasks = _start_threads("encode-part", 1, count=threads if self.splits_batches else 0)
        self._idle_threads = threading.Semaphore(threads)
        self._exclusive_tasks = _start_threads("encode-exclusive", threads, count=1)
        torch.set_num_threads(threads)  # the last number set is also the number of all threads to come
        weakref.finalize(self, _end_threads, self._part_tasks, threads)
        weakref.finalize(self, _end_threads, self._exclusive_tasks, 1)

    def run_exclusive(self, work: Callable[[], T]) -> T:
        """Run `work` on the exclusive thread; returns its result or raises its error. Waits for as long as it takes."""
        return _submit(self._exclusive_tasks, work).result()

    def split_count(self, size: int) -> int:
        """Into how many equal parts a batch of this size is split; 1 if that would leave half of the threads idle.

        The parts are equal so that, in a batch of a given size, an image gets the same vector at every position.
        """
        if not self.splits_batches:
            return 1
        parts = next(count for count in range(min(size, self.threads), 0, -1) if size % count == 0)
        return parts if 2 * parts > self.threads else 1

    def submit(self, tower: Tower, raw: torch.Tensor, vectors: torch.Tensor) -> BatchTask:
        """Run the tower on `raw`, into `vectors`; the pool uses both tensors until the task is done.

        Returns when a thread could begin another batch. That takes as long as the model does; the heartbeat detects
        a worker that is stuck.
        """
        parts = self.split_count(len(raw))
        if parts == 1:
            done = _submit(self._exclusive_tasks, partial(_run_tower, tower, raw, vectors, self.omp_threads))
            wait([done])
            return BatchTask([done])
        futures = []
        for raw_part, vectors_part in zip(raw.chunk(parts), vectors.chunk(parts), strict=True):
            self._idle_threads.acquire()
            done = _submit(self._part_tasks, partial(_run_tower, tower, raw_part, vectors_part, 1))
            done.add_done_callback(lambda _: self._idle_threads.release())
            futures.append(done)
        with self._idle_threads:
            return BatchTask(futures)


def _run_tower(tower: Tower, raw: torch.Tensor, vectors: torch.Tensor, omp_threads: int) -> _Pass:
    if torch.get_num_threads() != omp_threads:
        torch.set_num_threads(omp_threads)  # of this thread
    began_s, cpu_began_s = time.monotonic(), time.thread_time()
    with torch.inference_mode():
        vectors.copy_(tower(raw))
    return _Pass(omp_threads, time.thread_time() - cpu_began_s, began_s, time.monotonic())


def _submit(tasks: _Tasks, work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def task() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 border: the future raises it where its result is read
            future.set_exception(error)
        else:
            future.set_result(result)

    tasks.put(task)
    return future


def _start_threads(name: str, omp_threads: int, *, count: int) -> _Tasks:
    """Start threads that work through one task queue; each has the OpenMP threads given."""
    tasks: _Tasks = queue.SimpleQueue()
    started = threading.Barrier(count + 1)
    for number in range(count):
        args = (tasks, omp_threads, started)
        full_name = f"{name}-{number}" if count > 1 else name
        threading.Thread(target=_work, args=args, name=full_name, daemon=True).start()
    started.wait(START_TIMEOUT_S)
    return tasks


def _work(tasks: _Tasks, omp_threads: int, started: threading.Barrier) -> None:
    torch.set_num_threads(omp_threads)
    # torch binds the number to this thread on the first read; otherwise the thread would take the last number set.
    torch.get_num_threads()
    started.wait(START_TIMEOUT_S)
    while (task := tasks.get()) is not None:
        task()
        del task  # otherwise the task, and its tensors, would be kept until the next one


def _end_threads(tasks: _Tasks, threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)


def limit_threads(asked: int | None) -> int | None:
    """Set the number of torch's threads on a CPU; returns the most that may ever be used, None for no such limit.

    If torch uses fewer threads than there are cores, by its own choice or OMP_NUM_THREADS, that number stays the limit.
    """
    torch_threads, cores = torch.get_num_threads(), usable_cores()
    torch.set_num_threads(asked or min(torch_threads, cores))
    return torch_threads if torch_threads < cores else None
