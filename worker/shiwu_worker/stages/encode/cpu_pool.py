"""The threads in which a model runs on a CPU of several cores.

OpenMP keeps a team of threads for each thread that has used it. Once these are together more than there are cores, none
waits awake any more, and short steps take twice as long. So one thread, the captain, does all that takes every core.

A large batch is divided: each thread works on its own part, with one core. With all cores at each step of the model the
quickest waits for the slowest at each step, so that what a loader takes from one core is lost on all of them. Here a
thread that was held up holds up nobody, and whoever is done goes on with the next batch.
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

from shiwu_worker.stages.encode.towers import Tower

T = TypeVar("T")
START_S: Final = 60.0
_Task = Callable[[], None]
_Tasks = queue.SimpleQueue[_Task | None]


@dataclass(frozen=True, slots=True)
class Spent:
    """What a batch took.

    Args:
        cost: seconds of the device; on a CPU core-seconds of the threads that ran the model, which other programs
            lengthen by far less than the time of the clock.
        seconds: of the clock, from the moment at which its first part began.
        omp_threads: with which it was run as a whole; 0 where it was divided.
    """

    cost: float
    seconds: float
    omp_threads: int = 0


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of the tower: by so many threads of OpenMP, with that CPU of the one that leads them."""

    omp_threads: int
    cpu_s: float
    began_s: float
    ended_s: float


class Work:
    """The parts of one batch."""

    def __init__(self, parts: Sequence[Future[_Pass]]) -> None:
        self._parts = tuple(parts)

    def wait(self) -> Spent:
        """Until all are done; raises what went wrong in one of them."""
        wait(self._parts)  # for all, whatever happened: they write where another batch will lie
        passes = [part.result() for part in self._parts]
        return Spent(
            cost=sum(one.omp_threads * one.cpu_s for one in passes),
            seconds=max(one.ended_s for one in passes) - min(one.began_s for one in passes),
            omp_threads=passes[0].omp_threads if len(passes) == 1 else 0,
        )


class CpuInferencePool:
    """A captain, and threads for the parts of batches. They end with it, and hold up no end of the process.

    Args:
        threads: how many; also the number of torch's threads from now on.
        is_divided: divide batches where they can be; otherwise the captain does all of them.
    """

    def __init__(self, threads: int, *, is_divided: bool = False) -> None:
        self.threads = threads
        self.is_divided = is_divided and threads > 1
        self.omp_threads = threads
        """Of the captain, from its next batch on: all, or fewer where other programs take the cores."""
        self._parts = _start("crew", 1, count=threads if self.is_divided else 0)
        self._idle = threading.Semaphore(threads)
        self._orders = _start("captain", threads, count=1)
        torch.set_num_threads(threads)  # what was set last is also the number of all threads to come
        weakref.finalize(self, _dismiss, self._parts, threads)
        weakref.finalize(self, _dismiss, self._orders, 1)

    def call(self, work: Callable[[], T]) -> T:
        """Let the captain do it; returns or raises what it does. How long it takes is the caller's concern."""
        return _put(self._orders, work).result()

    def parts_of(self, rung: int) -> int:
        """Into how many parts of one size it divides such a batch; 1 where that would leave half of the threads idle.

        Of one size, so that in a batch of a size a picture gets the same vector wherever in it it lies.
        """
        if not self.is_divided:
            return 1
        parts = next(count for count in range(min(rung, self.threads), 0, -1) if rung % count == 0)
        return parts if 2 * parts > self.threads else 1

    def start(self, tower: Tower, raw: torch.Tensor, vectors: torch.Tensor) -> Work:
        """Run the tower on `raw`, into `vectors`; both are the crew's until the work is done.

        Returns when a thread can begin another batch. That takes as long as the model does; whoever watches the device
        has a limit for it.
        """
        parts = self.parts_of(len(raw))
        if parts == 1:
            done = _put(self._orders, partial(_run, tower, raw, vectors, self.omp_threads))
            wait([done])
            return Work([done])
        work = []
        for its in zip(raw.chunk(parts), vectors.chunk(parts), strict=True):
            self._idle.acquire()
            done = _put(self._parts, partial(_run, tower, *its, 1))
            done.add_done_callback(lambda _: self._idle.release())
            work.append(done)
        with self._idle:
            return Work(work)


def _run(tower: Tower, raw: torch.Tensor, vectors: torch.Tensor, omp_threads: int) -> _Pass:
    if torch.get_num_threads() != omp_threads:
        torch.set_num_threads(omp_threads)  # of this thread
    began_s, cpu_from_s = time.monotonic(), time.thread_time()
    with torch.inference_mode():
        vectors.copy_(tower(raw))
    return _Pass(omp_threads, time.thread_time() - cpu_from_s, began_s, time.monotonic())


def _put(tasks: _Tasks, work: Callable[[], T]) -> Future[T]:
    done: Future[T] = Future()

    def task() -> None:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 border: whoever waits for it judges it
            done.set_exception(error)
        else:
            done.set_result(found)

    tasks.put(task)
    return done


def _start(name: str, omp_threads: int, *, count: int) -> _Tasks:
    tasks: _Tasks = queue.SimpleQueue()
    started = threading.Barrier(count + 1)
    for number in range(count):
        args = (tasks, omp_threads, started)
        threading.Thread(target=_work, args=args, name=f"{name}-{number}", daemon=True).start()
    started.wait(START_S)
    return tasks


def _work(tasks: _Tasks, omp_threads: int, started: threading.Barrier) -> None:
    torch.set_num_threads(omp_threads)
    # Asking for it makes it this thread's own; else its first operator would take the number that was set last.
    torch.get_num_threads()
    started.wait(START_S)
    while (task := tasks.get()) is not None:
        task()
        del task  # or it would be kept until the next one


def _dismiss(tasks: _Tasks, threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)
