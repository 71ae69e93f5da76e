"""Finds LitServe's best settings on this machine: processes and their threads, batch size, and time-out of a batch.

One kind of setting after another is tried around the best so far, again until a round changes nothing. Each candidate
is started and warmed, and has a turn while all other systems are stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from bench.picture_systems import LitServeSettings, Place, concurrency_of, litserve_system
from bench.report import number
from bench.turns import rate, taking_part
from shiwu_worker.runtime.cpus import usable_cores

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
TIMEOUTS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Not 0, with which LitServe polls without a pause."""
MAX_ROUNDS: Final = 3
GAIN: Final = 1.02
"""A candidate has to be so much better than the best so far: turns differ by chance."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate and its images per second."""

    settings: LitServeSettings
    per_second: float


def processes(cores: int, *, is_gpu: bool) -> list[tuple[int, int]]:
    """Numbers of processes on the device, with the threads of torch in each, that share the cores."""
    if is_gpu:
        return [(workers, max(1, cores // workers)) for workers in (1, 2, 3, 4) if workers <= max(2, cores)]
    return [(workers, cores // workers) for workers in range(1, cores + 1) if cores % workers == 0]


def neighbours(values: tuple[float, ...], value: float) -> list[float]:
    """The next smaller and the next larger of these values."""
    smaller, larger = [each for each in values if each < value], [each for each in values if each > value]
    return smaller[-1:] + larger[:1]


def candidates(best: LitServeSettings, *, cores: int, is_gpu: bool) -> Iterator[list[LitServeSettings]]:
    """For each kind of setting, what is tried next; `best` is asked for once for each kind."""
    yield [replace(best, workers=workers, threads=threads) for workers, threads in processes(cores, is_gpu=is_gpu)]
    yield [
        replace(best, max_batch=int(size), concurrency=concurrency_of(int(size)))
        for size in neighbours(BATCHES, best.max_batch)
    ]
    yield [replace(best, batch_timeout_s=timeout_s) for timeout_s in neighbours(TIMEOUTS_S, best.batch_timeout_s)]


def sweep(
    first: LitServeSettings, measure: Callable[[LitServeSettings], float], *, cores: int, is_gpu: bool
) -> list[Tried]:
    """All candidates that were measured, each once, the best one first.

    Args:
        measure: returns images per second.
    """
    rates = {first: measure(first)}
    best = first
    for _ in range(MAX_ROUNDS):
        before = best
        for kind in range(3):
            for candidate in list(candidates(best, cores=cores, is_gpu=is_gpu))[kind]:
                if candidate not in rates:
                    rates[candidate] = measure(candidate)
                if rates[candidate] > rates[best] * GAIN:
                    best = candidate
        if best == before:
            break
    others = sorted((each for each in rates if each != best), key=lambda each: -rates[each])
    return [Tried(each, rates[each]) for each in (best, *others)]


def tuned(place: Place, first: LitServeSettings, *, seconds: float, is_gpu: bool) -> list[Tried]:
    """Sweep with real servers in this place, and print what was found."""

    def measure(settings: LitServeSettings) -> float:
        system = replace(litserve_system(settings), name=f"LitServe {settings.label}")
        with taking_part(place, system) as participant:
            participant.player.turn(seconds)  # not counted: fills every stage with jobs
            found = rate([participant.player.turn(seconds)])
        print(f"  LitServe with {settings.label}: {number(found)} pictures/s", flush=True)
        return found

    tried = sweep(first, measure, cores=usable_cores(), is_gpu=is_gpu)
    print(f"  LitServe's best of {len(tried)}: {tried[0].settings.label}", flush=True)
    return tried
