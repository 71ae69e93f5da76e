"""Tells once a second what this worker does, for `shiwu top`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Final

import msgspec

from shiwu.broker.worker_state import WorkerState
from shiwu_worker.runtime.proc import resident_bytes

if TYPE_CHECKING:
    from shiwu.contract import LabelsInfo
    from shiwu_worker.loaders.pool import LoaderPool
    from shiwu_worker.runtime.progress import LoadMeter, LoadSums
    from shiwu_worker.stages.encode.encoder import Encoder

INTERVAL_S: Final = 1.0
WINDOW_S: Final = 10.0
"""Rates and shares are those of the last ten seconds."""


class WorkerReporter:
    """Reads counters that the pipeline keeps anyway. Used by one thread.

    Args:
        write: stores a state; may raise an error of Redis.
        about: the fields that do not change.
        labels: the default label set.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        write: Callable[[WorkerState], None],
        about: WorkerState,
        *,
        labels: Callable[[], LabelsInfo],
        meter: LoadMeter,
        in_flight: Sized,
        loaders: LoaderPool,
        encoder: Encoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._about = about
        self._labels = labels
        self._meter = meter
        self._in_flight = in_flight
        self._loaders = loaders
        self._encoder = encoder
        self._clock = clock
        self._started_s = clock()
        self._due_s = self._started_s
        self._window: deque[LoadSums] = deque([meter.sums()])

    def publish(self) -> None:
        """Store the state, at most once a second."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        # Half an interval early, because the heartbeat's ticks come a little later than an interval.
        self._due_s = now_s + INTERVAL_S / 2
        self._write(self._state(now_s))

    def _state(self, now_s: float) -> WorkerState:
        sums = self._meter.sums()
        while len(self._window) > 1 and self._window[1].at_s <= sums.at_s - WINDOW_S:
            self._window.popleft()
        load = self._meter.since(self._window[0], until=sums)
        self._window.append(sums)
        seconds = max(INTERVAL_S, load.seconds)
        labels = self._labels()
        used_bytes, total_bytes = self._encoder.gpu_memory() or (resident_bytes(), 0)
        return msgspec.structs.replace(
            self._about,
            labels=labels.name or "",
            labels_digest=labels.digest,
            uptime_s=round(now_s - self._started_s, 1),
            images_per_s=round(load.pictures / seconds, 1),
            batch=round(load.pictures / load.batches, 1) if load.batches else 0.0,
            max_batch=self._encoder.size_policy.largest,
            limit=load.limit,
            device_share=load.device,
            in_flight=len(self._in_flight),
            loaders=len(self._loaders.pids),
            loader_restarts=self._loaders.restarts,
            memory_bytes=used_bytes,
            memory_total_bytes=total_bytes,
        )
