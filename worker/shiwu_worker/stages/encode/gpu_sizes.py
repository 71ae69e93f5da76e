"""Which batch sizes a GPU uses: those for which it has memory, and whose batches take a limited time.

A GPU is timed with several batches under way, as it runs under load. The latency of a single batch would include the
copies and the waits of the host, which other batches hide.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.accelerator import Accelerator
from shiwu_worker.stages.encode.device import is_out_of_memory

log: FilteringBoundLogger = structlog.get_logger()
WARM_RUNS: Final = 3
"""Runs before a size is timed or captured: libraries choose their kernels in the first runs."""
TIMED_RUNS: Final = 2
BUFFERS: Final = 3
"""Staging buffers: one on the device, one copied ahead, one whose result is being read."""
BATCHES: Final = 6
"""Batches of one measurement of the throughput."""
MIN_THROUGHPUT: Final = 0.9
"""Share of the best throughput that the sizes within the time limit must reach; otherwise larger ones are allowed."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Flight(Protocol[T_co]):
    """A batch that was launched."""

    def collect(self) -> T_co:
        """Wait for its result."""


def fitting_sizes(
    tower: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_sizes: Sequence[int],
    shape: tuple[int, int, int],
    accelerator: Accelerator,
    limit_s: float,
) -> tuple[int, ...]:
    """The batch sizes that the device has memory for, and whose batches take at most about `limit_s`; ascending.

    Each of them has run afterwards, so a capture finds all kernels chosen. There was memory for staging buffers too.

    Raises:
        RuntimeError: not even the smallest size fits, or the device failed.
    """
    seconds: dict[int, float] = {}
    for size in sorted(batch_sizes):
        try:
            seconds[size] = time_size(tower, size, shape, accelerator)
        except RuntimeError as error:
            # Out of memory in a capture would end all captures, so this size and all larger ones are left out.
            if not seconds or not is_out_of_memory(error):
                raise
            log.warning("batch_size_does_not_fit", batch_size=size, error=str(error)[:300])
            break
        finally:
            accelerator.release_memory()
        if seconds[size] > time_limit_s(seconds, limit_s):
            break
    longest_s = time_limit_s(seconds, limit_s)
    return tuple(size for size in seconds if seconds[size] <= longest_s)


def time_size(
    tower: Callable[[torch.Tensor], torch.Tensor], size: int, shape: tuple[int, int, int], accelerator: Accelerator
) -> float:
    """Seconds of one run, from the events of the device."""
    # With the memory that batches need besides the pass: staging buffers, the input of graphs, and some to spare.
    raw = accelerator.allocate(((BUFFERS + 2) * size, *shape), torch.uint8)[:size]
    begun, done = accelerator.event(is_timed=True), accelerator.event(is_timed=True)
    with accelerator.computing():
        for _ in range(WARM_RUNS):
            tower(raw)
        accelerator.record(begun)
        for _ in range(TIMED_RUNS):
            tower(raw)
        accelerator.record(done)
    accelerator.synchronize()
    return begun.elapsed_time(done) / 1000 / TIMED_RUNS


def time_limit_s(seconds: Mapping[int, float], limit_s: float) -> float:
    """The time that a batch may take: `limit_s`, or more where only longer batches use the device well.

    Args:
        seconds: size → seconds of one batch.
    """
    best = max(size / batch_s for size, batch_s in seconds.items())
    enough = min(batch_s for size, batch_s in seconds.items() if size / batch_s >= MIN_THROUGHPUT * best)
    return max(limit_s, enough)


def back_to_back(
    launch: Callable[[int], Flight[T]], *, under_way: int, clock: Callable[[], float] = time.monotonic
) -> tuple[float, list[T]]:
    """Seconds of one batch while others are under way, and the results of all of them.

    Args:
        launch: gets the number of the batch, from 0.
        under_way: batches that may be under way at a time.
    """
    flights: deque[Flight[T]] = deque()
    results: list[T] = []
    begun_s = 0.0
    for number in range(BATCHES + under_way):
        if number < BATCHES:
            flights.append(launch(number))
        if flights and (len(flights) == under_way or number >= BATCHES):
            results.append(flights.popleft().collect())
            # The first batch had no other before it, so time counts from its end on.
            if len(results) == 1:
                begun_s = clock()
    return (clock() - begun_s) / (len(results) - 1), results
