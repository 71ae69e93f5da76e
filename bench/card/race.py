"""Random schedules on two threads, beside FP32 passes and labels: each batch must get the bits of a serial run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from tests.support import schedules

from bench.card.measure import Measures
from bench.card.models import open_encoder, pixels_of

SCHEDULES: Final = 20_000
LONGEST_S: Final = 105.0
"""The search ends after this time; the figures say how many schedules were played."""
SIZES: Final = (1, 2, 4, 8, 16)
"""Small ones, so that there is time for all schedules."""
LARGE_SIZES: Final = (32, 64, 256)
LARGE_SCHEDULES: Final = 300
LARGE_S: Final = 10.0
MAX_STEPS: Final = 12
CHECK_EVERY_S: Final = 0.05
"""FP32 passes at the same time as the schedules take the GPU from them."""


def measures(*, tiny: bool) -> Measures:
    """The schedules, and whether rows keep their bits in other rows of a batch."""
    yield "schedules", lambda: play_all("vit-b-16", tiny=tiny, wanted=20 if tiny else SCHEDULES)
    if not tiny:
        yield (
            "schedules of large batches",
            lambda: play_all("vit-b-16", tiny=tiny, wanted=LARGE_SCHEDULES, sizes=LARGE_SIZES, longest_s=LARGE_S),
        )
    yield "rows in other places", lambda: _moved_rows(tiny=tiny)


def play_all(
    model: str, *, tiny: bool, wanted: int, sizes: tuple[int, ...] = SIZES, longest_s: float = LONGEST_S
) -> dict[str, Any]:
    """Play `wanted` schedules on two threads, or as many as there is time for.

    Raises:
        AssertionError: a batch got other bits than alone.
    """
    encoder, spec = open_encoder(model, sizes=(1, 2, 4) if tiny else sizes, tiny=tiny)
    pixels = pixels_of(spec, 16)
    batches = schedules.serial(encoder, pixels, seed=0)
    exact, texts = encoder.encode_exact(pixels[:2]), encoder.encode_texts(["猫", "狗"])
    before = _reserved()
    pause = threading.Event()
    began_s = time.monotonic()
    counter = _Counter(wanted, ends_s=time.monotonic() + longest_s)

    def play(seed: int, most_under_way: int) -> None:
        draw = random.Random(seed)
        while counter.next():
            counter.batches += schedules.play(
                encoder, batches, steps=draw.randint(1, MAX_STEPS), draw=draw, most_under_way=most_under_way
            )

    def check_beside() -> None:
        while not counter.is_over:
            np.testing.assert_array_equal(encoder.encode_exact(pixels[:2]), exact)
            np.testing.assert_array_equal(encoder.encode_texts(["猫", "狗"]), texts)
            counter.checks += 1
            pause.wait(CHECK_EVERY_S)

    # Together they may hold all three buffers and never wait for each other.
    _together([lambda: play(1, 2), lambda: play(2, 1), check_beside], counter)
    grown = _reserved() - before
    found = {
        "schedules": counter.played,
        "wanted": wanted,
        "batches": counter.batches,
        "seconds": round(time.monotonic() - began_s, 1),
        "checks beside": counter.checks,
        "reserved memory grew by MiB": round(grown / 2**20, 1),
    }
    if counter.errors:
        raise AssertionError(f"{found}: {counter.errors[0]}")
    return found


class _Counter:
    """Counts schedules for several threads, and ends all of them at the first error."""

    def __init__(self, wanted: int, *, ends_s: float) -> None:
        self._wanted, self._ends_s = wanted, ends_s
        self._lock = threading.Lock()
        self.played = self.batches = self.checks = 0
        self.errors: list[str] = []
        self.is_over = False

    def next(self) -> bool:
        """Whether another schedule is to be played; counts it."""
        with self._lock:
            self.is_over = self.is_over or self.played >= self._wanted or time.monotonic() > self._ends_s
            self.played += not self.is_over
            return not self.is_over

    def fail(self, error: BaseException) -> None:
        """Keep an error and end the search."""
        with self._lock:
            self.errors.append(f"{type(error).__name__}: {error}"[:2000])
            self.is_over = True


def _together(works: list[Callable[[], None]], counter: _Counter) -> None:
    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 border: raised again by the caller
            counter.fail(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _moved_rows(*, tiny: bool) -> dict[str, Any]:
    """How much a vector differs when its image stands in another row of a batch of the same size."""
    found = {}
    sizes = (2, 4) if tiny else (8, 64, 256)
    encoder, spec = open_encoder("vit-b-16", sizes=sizes, tiny=tiny)
    for size in sizes:
        pixels = pixels_of(spec, size)
        vectors = encoder.encode(pixels)
        differences = []
        for seed in range(3 if tiny else 50):
            order = np.random.default_rng(seed).permutation(size)
            differences.append(float(np.abs(encoder.encode(pixels[order]) - vectors[order]).max()))
        found[str(size)] = {"largest difference": max(differences), "same bits": max(differences) == 0.0}
    return found


def _reserved() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
