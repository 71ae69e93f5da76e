"""Systems that `service` and `latency` compare: shiwu's worker, and its peers in their best fair settings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import redis
import urllib3
from tests.support.processes import LOOPBACK, Process, WorkerProcess, clean_environment, free_ports
from tests.support.waiting import wait_until

from bench import usage
from bench.celery_app import SETTINGS_TEXT
from bench.checkpoints import Checkpoint
from bench.machine import named
from bench.sources import Source
from bench.workers import CeleryWorker
from shiwu.contract import Lane
from shiwu_worker.runtime.cpus import usable_cores

SHIWU: Final = "shiwu"
REFERENCE: Final = "reference script"
LITSERVE: Final = "LitServe"
READY_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system runs: server, source and model."""

    url: str
    client: redis.Redis
    folder: Path
    source: Source
    checkpoint: Checkpoint
    lane: Lane
    dtype: str
    """The dtype of shiwu's worker, for peers that can choose theirs."""
    worker_env: Mapping[str, str]
    """Further SHIWU_* settings of shiwu's worker."""

    @property
    def model_env(self) -> dict[str, str]:
        """Variables by which shiwu's worker and the bare model find model and images."""
        # Empty is the embedded model; without the variable, `WorkerProcess` takes the model of the tests.
        return {**self.source.env, "SHIWU_MODEL": self.checkpoint.setting or "", **self.worker_env}


@dataclass(frozen=True, slots=True)
class Running:
    """A system that takes jobs."""

    processes: tuple[Process, ...]

    def check(self) -> None:
        """Raise ServerError where one of its processes has ended."""
        for process in self.processes:
            if not process.is_running:
                raise process.error("expected to go on running")

    def cpu_s(self) -> tuple[float, float]:
        """Return the CPU seconds of its processes and of those they started: for shiwu, worker and loaders."""
        own = [process.pid for process in self.processes]
        below = [pid for pid in usage.families(own) if pid not in own]
        return usage.cpu_s(own), usage.cpu_s(below)


@dataclass(frozen=True, slots=True)
class System:
    """One of the compared systems."""

    name: str
    versions: str
    settings: str
    open: Callable[[Place], AbstractContextManager[Running]]


@dataclass(frozen=True, slots=True)
class LitServeSettings:
    """The settings that LitServe's users tune."""

    max_batch: int
    batch_timeout_s: float
    workers: int
    """Processes on the device."""
    threads: int
    """Threads of torch in each of these."""
    concurrency: int
    """Threads of the Celery worker that feeds it."""

    @property
    def label(self) -> str:
        """The settings as a text."""
        return (
            f"max_batch_size {self.max_batch}, batch_timeout {self.batch_timeout_s:g} s, {self.workers} worker(s) of "
            f"{self.threads} thread(s)"
        )


def concurrency_of(max_batch: int) -> int:
    """How many requests are sent at a time, so that batches can be full: one runs, one is decoded, one waits."""
    return min(256, max(4, 3 * max_batch))


def litserve_settings(
    *,
    is_gpu: bool,
    max_batch: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch_timeout_s: float | None = None,
) -> LitServeSettings:
    """Return settings that are good on a CPU with few cores, or on a GPU: where `litserve_sweep` begins.

    A time-out of 0 would send batches immediately, but polls without a pause and takes a core from the model. On a CPU
    larger batches are no faster; on a GPU a second process decodes while the first is on the device.
    """
    batch, processes = max_batch or (64 if is_gpu else 8), workers or (2 if is_gpu else 1)
    return LitServeSettings(
        batch,
        batch_timeout_s or 0.005,
        processes,
        threads or max(1, usable_cores() // processes),
        concurrency=concurrency_of(batch),
    )


def systems(litserve: LitServeSettings, *, shiwu_settings: str) -> tuple[System, ...]:
    """Return all systems that can run here, shiwu first."""
    models = named("torch", "transformers", "pillow")
    celery = named("celery", "kombu", "boto3", "urllib3")
    in_celery = f"in a Celery task, pool=solo, prefetch 1, FP32, {usable_cores()} threads of torch; {SETTINGS_TEXT}"
    found = [
        System(SHIWU, f"{named('shiwu')}, {models}", shiwu_settings, _shiwu),
        System(REFERENCE, f"{models}, {celery}", in_celery, _reference),
    ]
    if has_litserve():
        found.append(litserve_system(litserve))
    return tuple(found)


def litserve_system(settings: LitServeSettings) -> System:
    """Return LitServe with these settings."""
    own = f"fed by a Celery task in {settings.concurrency} threads, {settings.label}, fast_queue, shiwu's dtype, label "
    own += f"vectors computed once, transformers' processor in {usable_cores()} threads; {SETTINGS_TEXT}"
    versions = named("litserve", "torch", "transformers", "pillow", "celery", "kombu", "boto3", "urllib3")
    return System(LITSERVE, versions, own, partial(_litserve, settings))


def has_litserve() -> bool:
    """Return whether the extra `bench` is installed."""
    return importlib.util.find_spec("litserve") is not None


def other_shiwu(settings: str, env: Mapping[str, str]) -> System:
    """Return a second worker of shiwu, with other settings."""
    return System(f"{SHIWU}, {settings}", named("shiwu"), settings, partial(_shiwu, name="other", own=env))


@contextmanager
def _shiwu(place: Place, *, name: str = SHIWU, own: Mapping[str, str] | None = None) -> Iterator[Running]:
    # Images repeat in a run, and each is to be decoded and encoded, as the other systems do.
    common = {"SHIWU_LOG_LEVEL": "warning", "SHIWU_TORCH_THREADS": "0", "SHIWU_SHARE_IMAGES": "false"}
    env = {**common, **place.model_env, **(own or {})}
    with WorkerProcess(redis_url=place.url, folder=place.folder, name=name, env=env) as worker:
        yield Running((worker.wait_ready(timeout_s=READY_S),))


@contextmanager
def _reference(place: Place) -> Iterator[Running]:
    options = ("--pool=solo", "--concurrency=1", "--prefetch-multiplier=1")
    worker = _celery(place, "bench.reference_app:app", *options, name="reference", env={})
    with worker:
        yield Running((worker.wait_ready(timeout_s=READY_S),))


@contextmanager
def _litserve(settings: LitServeSettings, place: Place) -> Iterator[Running]:
    [port] = free_ports(1)
    url = f"http://{LOOPBACK}:{port}"
    own = {
        "BENCH_MODEL": str(place.checkpoint.folder),
        "BENCH_DTYPE": place.dtype,
        "BENCH_WORKERS": str(settings.workers),
        "BENCH_THREADS": str(settings.threads),
        "BENCH_MAX_BATCH": str(settings.max_batch),
        "BENCH_BATCH_TIMEOUT_S": str(settings.batch_timeout_s),
    }
    command = [sys.executable, "-m", "bench.litserve_server", str(port)]
    options = ("--pool=threads", f"--concurrency={settings.concurrency}", "--prefetch-multiplier=1")
    env = {"BENCH_LITSERVE_URL": url, "BENCH_CONCURRENCY": str(settings.concurrency)}
    with ExitStack() as stack:
        server = Process(command, name="litserve-server", folder=place.folder, env=clean_environment(own))
        stack.callback(server.stop, timeout_s=5)
        server.start()
        worker = stack.enter_context(_celery(place, "bench.litserve_app:app", *options, name="litserve", env=env))
        wait_until(lambda: not server.is_running or _is_healthy(url), timeout_s=READY_S, every_s=0.2, what="LitServe")
        running = Running((server, worker.wait_ready(timeout_s=READY_S)))
        running.check()
        yield running


def _celery(place: Place, app: str, *options: str, name: str, env: Mapping[str, str]) -> CeleryWorker:
    own = {"BENCH_MODEL": str(place.checkpoint.folder), **place.source.env, **env}
    return CeleryWorker(app, *options, redis_url=place.url, lane=place.lane, name=name, folder=place.folder, env=own)


def _is_healthy(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/health", timeout=2, retries=False).status == 200
    except (urllib3.exceptions.HTTPError, OSError):
        return False
