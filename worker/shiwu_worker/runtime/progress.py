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


@dataclass(frozen=True, slots=True)
class LoadSums:
    """What a `LoadMeter` has added up since it was made, at one moment of the monotonic clock."""

    at_s: float
    images: int = 0
    batches: int = 0
    idle_s: float = 0.0
    device_s: float = 0.0
    fetch_s: float = 0.0
    decode_s: float = 0.0


class LoadMeter:
    """Sums the times of a `LoadReport`. Thread-safe.

    Args:
        loader_threads: images that all loaders together may fetch or decode at a time.
    """

    def __init__(self, *, loader_threads: int) -> None:
        self._loader_threads = loader_threads
        self._lock = threading.Lock()
        self._images = self._batches = 0
        self._idle_s = self._device_s = self._fetch_s = self._decode_s = 0.0
        self._read_sums = self.sums()

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

    def sums(self) -> LoadSums:
        """What was added up until now, for `since`."""
        with self._lock:
            return LoadSums(
                time.monotonic(),
                self._images,
                self._batches,
                self._idle_s,
                self._device_s,
                self._fetch_s,
                self._decode_s,
            )

    def read(self) -> LoadReport:
        """Report the time since the last call. One thread may call it; others use `since`."""
        before = self._read_sums
        self._read_sums = self.sums()
        return self.since(before, until=self._read_sums)

    def since(self, before: LoadSums, *, until: LoadSums) -> LoadReport:
        """Report the time between two moments."""
        seconds = max(1e-9, until.at_s - before.at_s)
        threads_s = seconds * self._loader_threads
        return LoadReport(
            seconds=round(seconds, 1),
            pictures=until.images - before.images,
            batches=until.batches - before.batches,
            idle=_share(until.idle_s - before.idle_s, seconds),
            device=_share(until.device_s - before.device_s, seconds),
            fetch=_share(until.fetch_s - before.fetch_s, threads_s),
            decode=_share(until.decode_s - before.decode_s, threads_s),
        )


def _share(part_s: float, whole_s: float) -> float:
    return round(min(1.0, part_s / whole_s), 3)
