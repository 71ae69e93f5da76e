"""Progress of the pipeline, and which part of the worker limits its throughput."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Limit = Literal["arrivals", "device", "decode", "network", "messages"]
IDLE_SHARE: Final = 0.5
BUSY_SHARE: Final = 0.9
LOADERS_BUSY_SHARE: Final = 0.75


class Progress:
    """When the pipeline last made progress. Thread-safe.

    Jobs that are claimed, encoded, committed or released are progress. So are empty lanes and waits for Redis, because
    then the worker is not stuck.

    Args:
        clock: gives monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def mark(self) -> None:
        """Record that the pipeline made progress now."""
        self._last_s = self._clock()

    def age_s(self) -> float:
        """Seconds since the last progress."""
        return self._clock() - self._last_s


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a worker spent the time since the last report.

    Shares are 0 to 1: `idle` and `device` of the elapsed time, `fetch` and `decode` of the time of all loader threads.
    """

    seconds: float
    pictures: int
    batches: int
    idle: float
    """Share of the time in which the lanes were empty and nothing was in flight."""
    device: float
    fetch: float
    decode: float

    @property
    def limit(self) -> Limit:
        """What limits the throughput: the part that must become faster for more images per second."""
        if self.idle > IDLE_SHARE:
            return "arrivals"
        if self.device > BUSY_SHARE:
            return "device"
        if self.fetch + self.decode > LOADERS_BUSY_SHARE:
            return "network" if self.fetch > self.decode else "decode"
        return "messages"


class LoadMeter:
    """Sums the times of a `LoadReport`. Thread-safe.

    Args:
        loader_threads: images that all loaders together may fetch or decode at a time.
    """

    def __init__(self, *, loader_threads: int) -> None:
        self._loader_threads = loader_threads
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._since_s = time.monotonic()
        self._images = self._batches = 0
        self._idle_s = self._device_s = self._fetch_s = self._decode_s = 0.0

    def idle(self, seconds: float) -> None:
        """Add time in which the lanes were empty and nothing was in flight."""
        with self._lock:
            self._idle_s += seconds

    def loaded(self, *, fetch_s: float, decode_s: float) -> None:
        """Add the times of images that were loaded, each summed over the images."""
        with self._lock:
            self._fetch_s += fetch_s
            self._decode_s += decode_s

    def encoded(self, *, images: int, seconds: float) -> None:
        """Add one batch: its images, and how long the device was busy with it."""
        with self._lock:
            self._images += images
            self._batches += 1
            self._device_s += seconds

    def labels_encoded(self, *, seconds: float) -> None:
        """Add time in which the device encoded labels."""
        with self._lock:
            self._device_s += seconds

    def read(self) -> LoadReport:
        """Report the time since the last call, and start again at zero."""
        with self._lock:
            seconds = max(1e-9, time.monotonic() - self._since_s)
            threads_s = seconds * self._loader_threads
            load = LoadReport(
                seconds=round(seconds, 1),
                pictures=self._images,
                batches=self._batches,
                idle=round(min(1.0, self._idle_s / seconds), 3),
                device=round(min(1.0, self._device_s / seconds), 3),
                fetch=round(min(1.0, self._fetch_s / threads_s), 3),
                decode=round(min(1.0, self._decode_s / threads_s), 3),
            )
            self._reset()
        return load
