"""shiwu's whole worker with stand-ins for loaders and model: everything between Redis and Redis.

`python -m bench.standin --redis-url URL [--jobs N] [--per-batch-ms B] [--per-picture-ms A]`: claims, admits, batches,
"encodes" for A·n + B ms, scores, serialises real answers and commits them. With --jobs it ends after so many answers
and prints how long they took, for profiling; without, it works until SIGTERM.

It runs `bootstrap.open_service` with two parts replaced, so it follows every change of the worker.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final
from unittest.mock import patch
from zlib import crc32

import numpy as np
import redis
from numpy.typing import NDArray
from tests.support.waiting import wait_until

from bench.echo_loaders import EchoStarter
from shiwu.contract import COUNTERS, Head, ModelInfo
from shiwu_worker.config.batches import batch_sizes, slot_count
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import DeviceErrorKind, FatalError
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.loaders import pool
from shiwu_worker.loaders.protocol import Loaded, LoadResult, LoadTask
from shiwu_worker.loaders.shared_memory import KnownImages
from shiwu_worker.service import bootstrap
from shiwu_worker.telemetry import logs

ECHO_THREADS: Final = 64
"""Images that one process of `bench.echo_loaders` holds at a time: they stand for those of many loaders."""
TABLE_ENTRIES: Final = 1 << 17
"""As many as with the default settings."""
WIDTH: Final = 8
"""Length of a stand-in's vector."""
HASHES: Final = tuple(f"{number:064x}" for number in range(1 << 14))
"""Of the bytes of images: more than are in flight, because each has bytes of its own, as most have."""


class StandInLoaders:
    """Loaders that return every image immediately."""

    pids: Final = (os.getpid(),)
    restarts: Final = 0

    def __init__(self, *, slots: int) -> None:
        self.pixels: NDArray[np.uint8] = np.zeros((slots, 1), np.uint8)
        self.known_images = KnownImages(np.zeros(TABLE_ENTRIES, np.uint64))
        self._on_loaded: Callable[[list[LoadResult]], None] = lambda _: None

    def subscribe(self, on_loaded: Callable[[list[LoadResult]], None]) -> None:
        """Pass results to this function."""
        self._on_loaded = on_loaded

    def wait_ready(self, timeout_s: float) -> None:
        """Return immediately: there is nothing to wait for."""

    def submit(self, tasks: Sequence[LoadTask]) -> None:
        """Return every image immediately."""
        now_s = time.monotonic()
        moments: Any = {"started_s": now_s, "fetched_s": now_s, "decoded_s": now_s}
        about: Any = {"n_bytes": 1, "format": "JPEG", "width": 1, "height": 1}
        self._on_loaded(
            [
                Loaded(ticket=task.ticket, slot=task.slot, **moments, **about, sha256=HASHES[task.ticket % len(HASHES)])
                for task in tasks
            ]
        )


class StandInFlight:
    """A batch on the stand-in's device."""

    def __init__(self, *, pictures: int, until_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.pictures = pictures
        self._clock = clock
        self.is_under_way = until_s > 0
        self._until_s = until_s

    def wait(self) -> None:
        """Sleep until the stand-in's device is done."""
        if (left_s := self._until_s - self._clock()) > 0:
            time.sleep(left_s)  # stands for the model


class StandInSizes:
    """Batch sizes of the stand-in: all waiting images, up to `largest`."""

    slowest_s = quickest_s = 0.0

    def __init__(self, largest: int) -> None:
        self.largest = self.wanted = largest

    @property
    def brief(self) -> int:
        """The largest batch for bulk while interactive jobs come: no other than usual, for its time is fixed."""
        return self.largest

    def take(self, waiting: int) -> int:
        """Return the number of images to take, without padding."""
        return min(waiting, self.largest)

    def lower(self, largest: int) -> None:
        """Limit batches to this size from now on."""
        self.largest = self.wanted = largest


class StandInEncoder:
    """A model that sleeps as long as a GPU of this speed takes, one batch after the other, and uses no CPU."""

    scale = 14.3
    bias = None
    default_head: Head = "softmax"
    threads = 1
    text_tokens = 77
    gpu_uuid = None
    known_vectors: Final = np.full((1, WIDTH), WIDTH**-0.5, np.float32)
    known_images: Final = np.zeros((1, 1, 1, 3), np.uint8)
    canary_sizes: Final = (1,)
    info = ModelInfo(id="stand-in", revision="0", dtype="none", device="none")

    def __init__(
        self,
        *,
        batch_sizes: Sequence[int],
        per_picture_ms: float,
        per_batch_ms: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.batch_sizes = tuple(batch_sizes)
        self.size_policy = StandInSizes(self.batch_sizes[-1])
        self._per_picture_s = per_picture_ms / 1000
        self._per_batch_s = per_batch_ms / 1000
        self._free_s = 0.0
        """When the device will have done all its work, on the monotonic clock."""
        self.busy_s = self.idle_s = 0.0
        """How long the device works on what it was given, and how long it had nothing to do between two batches."""

    def learn(self, flight: StandInFlight, *, host_s: float) -> None:
        """Do nothing: batch sizes are fixed."""

    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int]) -> StandInFlight:
        """Give the device A·n + B of work."""
        took_s = self._per_picture_s * len(rows) + self._per_batch_s
        if not took_s:
            return StandInFlight(pictures=len(rows), until_s=0.0)
        now_s = self._clock()
        if self._free_s:
            self.idle_s += max(0.0, now_s - self._free_s)
        self.busy_s += took_s
        self._free_s = max(self._free_s, now_s) + took_s
        return StandInFlight(pictures=len(rows), until_s=self._free_s, clock=self._clock)

    def collect(self, flight: StandInFlight) -> NDArray[np.float32]:
        """Return equal vectors."""
        flight.wait()
        return np.full((flight.pictures, WIDTH), WIDTH**-0.5, np.float32)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Give the device known images and wait for them; no job waits meanwhile, so nothing counts as idle."""
        vectors = self.collect(self.launch(pixels, range(len(pixels))))
        self._free_s = 0.0
        return vectors

    def encode_exact(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return equal vectors immediately."""
        return np.full((len(pixels), WIDTH), WIDTH**-0.5, np.float32)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return different vectors for different words."""
        digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
        chance = np.frombuffer(digests, "<u4").reshape(len(texts), WIDTH).astype(np.float32) / 2**31 - 1
        unit: NDArray[np.float32] = chance / np.linalg.norm(chance, axis=1, keepdims=True)
        return unit

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """Return different tokens for different words."""
        return [LabelTokens((crc32(label.encode()),), is_readable=True) for label in labels]

    def gpu_memory(self) -> tuple[int, int] | None:
        """Return None: the stand-in has no device."""
        return None

    def error_kind(self, error: BaseException) -> DeviceErrorKind:
        """Return OTHER: the stand-in has no device."""
        return DeviceErrorKind.OTHER


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--jobs", type=int, help="end when so many have been answered")
    parser.add_argument("--slots", type=int, default=1024, help="0: as a worker on this machine would")
    parser.add_argument("--cap", type=int, default=256, help="largest batch")
    parser.add_argument("--per-picture-ms", type=float, default=0.0)
    parser.add_argument("--per-batch-ms", type=float, default=0.0)
    parser.add_argument("--echo-loaders", type=int, default=0, help="processes that exchange frames; 0: no frames")
    parser.add_argument("--grace-s", type=float, default=1.0, help="to finish what is held after SIGTERM")
    parser.add_argument("--limit-s", type=float, default=300.0)
    return parser.parse_args()


def main() -> None:
    """Run the stand-in worker."""
    asked = _arguments()
    logs.set_up(level="warning", form="json")
    settings = Settings(
        redis_url=asked.redis_url,
        max_batch=asked.cap,
        slots=asked.slots,
        log_level="warning",
        lease_s=60,
        default_labels="six-zh",
        grace_s=asked.grace_s,
        loaders=asked.echo_loaders,
        loader_spares=0,
        loader_threads=ECHO_THREADS if asked.echo_loaders else 8,
        source_threads=asked.echo_loaders * ECHO_THREADS,
    )
    encoder = StandInEncoder(
        batch_sizes=batch_sizes(settings), per_picture_ms=asked.per_picture_ms, per_batch_ms=asked.per_batch_ms
    )
    failed: list[FatalError] = []
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())

    def on_fatal(error: FatalError) -> None:
        failed.append(error)
        done.set()

    def start_loaders(_: Any, settings: Settings, *__: Any, **___: Any) -> Any:
        return StandInLoaders(slots=slot_count(settings))

    changed: dict[str, Any] = {"load_encoder": lambda *_: encoder}
    if not asked.echo_loaders:
        changed["start_loaders"] = start_loaders
    with (
        patch.multiple(bootstrap, **changed),
        patch.object(pool, "LoaderStarter", EchoStarter),
        bootstrap.open_service(settings, on_fatal=on_fatal),
    ):
        if asked.jobs:
            _answer(asked.redis_url, asked.jobs, limit_s=asked.limit_s, done=done, encoder=encoder)
        else:
            done.wait()
    if failed:
        sys.exit(f"{failed[0]}")


def _answer(url: str, jobs: int, *, limit_s: float, done: threading.Event, encoder: StandInEncoder) -> None:
    began_s, before_s = time.monotonic(), time.process_time()
    with redis.Redis.from_url(url, socket_timeout=30) as client:

        def answered() -> int:
            return int(client.hget(COUNTERS, "answered") or 0)

        wait_until(lambda: done.is_set() or answered() >= jobs, timeout_s=limit_s, what=f"{jobs} answers")
        found = {"answered": answered(), "seconds": time.monotonic() - began_s}
        device = {"device_busy_s": encoder.busy_s, "device_idle_s": encoder.idle_s}
        print(json.dumps(found | {"cpu_seconds": time.process_time() - before_s} | device))


if __name__ == "__main__":
    main()
