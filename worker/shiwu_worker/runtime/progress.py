"""Time: the moments of one picture and the answer's milliseconds, whether a worker moves, and what it waits for."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final, Literal

Limit = Literal["arrivals", "device", "decode", "network", "messages"]
IDLE_SHARE: Final = 0.5
BUSY_SHARE: Final = 0.9
LOADERS_BUSY_SHARE: Final = 0.75


class Progress:
    """When the pipeline last moved: jobs were claimed, encoded or settled, lanes found empty, or Redis was away."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def mark(self) -> None:
        """Say that something moved. Safe from any thread."""
        self._last_s = time.monotonic()

    def age_s(self) -> float:
        """Seconds since something moved."""
        return time.monotonic() - self._last_s


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Where a worker's time went lately. Shares are 0 to 1: of the wall time, or of all the loaders' threads."""

    seconds: float
    pictures: int
    batches: int
    idle: float
    """Nothing waited in the lanes."""
    device: float
    fetch: float
    decode: float

    @property
    def limit(self) -> Limit:
        """What has to become quicker for more pictures a second."""
        if self.idle > IDLE_SHARE:
            return "arrivals"
        if self.device > BUSY_SHARE:
            return "device"
        if self.fetch + self.decode > LOADERS_BUSY_SHARE:
            return "network" if self.fetch > self.decode else "decode"
        return "messages"


class LoadMeter:
    """Adds up what `LoadReport` tells. Thread-safe.

    Args:
        loader_threads: pictures that may be fetched or decoded at a time, in all loaders.
    """

    def __init__(self, *, loader_threads: int) -> None:
        self._loader_threads = loader_threads
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._since_s = time.monotonic()
        self._pictures = self._batches = 0
        self._idle_s = self._device_s = self._fetch_s = self._decode_s = 0.0

    def idle(self, seconds: float) -> None:
        """Nothing waited in the lanes for so long."""
        with self._lock:
            self._idle_s += seconds

    def loaded(self, *, fetch_s: float, decode_s: float) -> None:
        """Pictures took so long, all of them together."""
        with self._lock:
            self._fetch_s += fetch_s
            self._decode_s += decode_s

    def encoded(self, *, pictures: int, seconds: float) -> None:
        """The device was busy with a batch."""
        with self._lock:
            self._pictures += pictures
            self._batches += 1
            self._device_s += seconds

    def read(self) -> LoadReport:
        """The time since the last read."""
        with self._lock:
            seconds = max(1e-9, time.monotonic() - self._since_s)
            threads_s = seconds * self._loader_threads
            load = LoadReport(
                seconds=round(seconds, 1),
                pictures=self._pictures,
                batches=self._batches,
                idle=round(min(1.0, self._idle_s / seconds), 3),
                device=round(min(1.0, self._device_s / seconds), 3),
                fetch=round(min(1.0, self._fetch_s / threads_s), 3),
                decode=round(min(1.0, self._decode_s / threads_s), 3),
            )
            self._begin()
        return load
