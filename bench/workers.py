"""Processes that answer jobs: a Celery worker of a peer's app, and the stand-in worker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.support.processes import Process, clean_environment
from tests.support.waiting import wait_until

from shiwu.contract import Lane


class Answerer(Process):
    """A process that creates a file when it takes jobs."""

    def __init__(self, command: list[str], *, name: str, folder: Path, env: Mapping[str, str]) -> None:
        self.ready_file = folder / f"{name}.ready"
        own = {"BENCH_READY_FILE": str(self.ready_file), "SHIWU_READY_FILE": str(self.ready_file)}
        super().__init__(command, name=name, folder=folder, env=clean_environment({**own, **env}))

    def start(self) -> Self:
        """Start it; `wait_ready` waits until it takes jobs."""
        self.ready_file.unlink(missing_ok=True)
        return super().start()

    def check(self) -> None:
        """Raise ServerError, with the end of its log, if it has ended."""
        if not self.is_running:
            raise self.error("expected to go on running")

    def wait_ready(self, *, timeout_s: float = 120.0) -> Self:
        """Wait until it takes jobs.

        Raises:
            ServerError: it ended or is not ready in time.
        """
        what = f"expected to be ready within {timeout_s} s"
        try:
            wait_until(lambda: self.ready_file.exists() or not self.is_running, timeout_s=timeout_s, every_s=0.01)
        except TimeoutError:
            raise self.error(what) from None
        self.check()
        return self


class CeleryWorker(Answerer):
    """`celery -A APP worker` on one lane's queue."""

    def __init__(
        self, app: str, *options: str, redis_url: str, lane: Lane, name: str, folder: Path, env: Mapping[str, str]
    ) -> None:
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel=WARNING", "-Q", lane.queue]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat", *options]
        super().__init__(command, name=name, folder=folder, env={"BENCH_REDIS_URL": redis_url, **env})

    def __exit__(self, *_: object) -> None:
        self.stop(timeout_s=5)


class StandInWorker(Answerer):
    """`bench.standin`; its name is in its answers."""

    def __init__(
        self,
        *,
        redis_url: str,
        name: str,
        folder: Path,
        slots: int,
        cap: int,
        cost: tuple[float, float],
        grace_s: float = 1.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "bench.standin", "--redis-url", redis_url]
        command += ["--slots", str(slots), "--cap", str(cap)]
        command += ["--per-picture-ms", str(cost[0]), "--per-batch-ms", str(cost[1]), "--grace-s", str(grace_s)]
        super().__init__(command, name=name, folder=folder, env={"SHIWU_WORKER_NAME": name, **(env or {})})

    def __exit__(self, *_: object) -> None:
        self.stop(timeout_s=5)
