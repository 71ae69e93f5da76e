"""Systems that `messages` compares: shiwu's worker with stand-ins for loaders and model, and Celery's own pools."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from bench import peers
from bench.celery_app import SETTINGS_TEXT
from bench.machine import named
from bench.workers import Answerer, CeleryWorker, StandInWorker
from shiwu.contract import Lane
from shiwu_worker.runtime.cpus import usable_cores

SHIWU: Final = "shiwu"
SLOTS: Final = 1366
"""Bulk may hold 1,024 of them, as many as a GPU that takes batches of 256 needs."""
CAP: Final = peers.FLUSH_EVERY
"""Largest batch: the same for shiwu and celery-batches."""
PREFETCH: Final = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of the stand-in for the model: a·n + b."""

    per_picture_ms: float
    per_batch_ms: float

    @classmethod
    def read(cls, text: str) -> Cost:
        """Read `a:b`, as on the command line."""
        return cls(*map(float, text.split(":")))

    def __str__(self) -> str:
        if not self.per_picture_ms and not self.per_batch_ms:
            return "no-op"
        return f"{self.per_picture_ms:g}·n + {self.per_batch_ms:g} ms"


@dataclass(frozen=True, slots=True)
class Spot:
    """Server, folder and cost of one run."""

    url: str
    client: redis.Redis
    folder: Path
    server_pid: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class System:
    """One of the compared systems."""

    name: str
    versions: str
    settings: str
    open: Callable[[Spot], AbstractContextManager[Answerer]]


def systems() -> tuple[System, ...]:
    """Return all systems, shiwu first."""
    celery = named("celery", "kombu", "redis")
    batches = named("celery-batches", "celery", "kombu")
    prefetch = f"--prefetch-multiplier={PREFETCH}"
    return (
        System(SHIWU, named("shiwu", "redis"), f"one process, slots {SLOTS}, batches up to {CAP}", _shiwu),
        _celery("Celery, threads", "plain", f"--pool=threads --concurrency=4 {prefetch}", celery),
        _celery("Celery, prefork", "plain", f"--pool=prefork --concurrency={usable_cores()} {prefetch}", celery),
        _celery("celery-batches", "batches", f"--pool=solo --concurrency=1 --prefetch-multiplier={4 * CAP}", batches),
    )


def _shiwu(spot: Spot) -> AbstractContextManager[Answerer]:
    cost = (spot.cost.per_picture_ms, spot.cost.per_batch_ms)
    return StandInWorker(redis_url=spot.url, name=SHIWU, folder=spot.folder, slots=SLOTS, cap=CAP, cost=cost)


def _celery(name: str, app: str, options: str, versions: str) -> System:
    extra = f"; flush_every {CAP}, flush_interval {peers.FLUSH_INTERVAL_S} s" if app == "batches" else ""

    def start(spot: Spot) -> AbstractContextManager[Answerer]:
        env = {
            "BENCH_PER_PICTURE_MS": str(spot.cost.per_picture_ms),
            "BENCH_PER_BATCH_MS": str(spot.cost.per_batch_ms),
            "BENCH_DEVICE_FILE": str(spot.folder / "device"),
        }
        return CeleryWorker(
            f"bench.peers:{app}",
            *options.split(),
            redis_url=spot.url,
            lane=Lane.BULK,
            name="-".join(name.lower().replace(",", "").split()),
            folder=spot.folder,
            env=env,
        )

    return System(name, versions, f"{options}; {SETTINGS_TEXT}{extra}", start)
