"""Backfills as tests start them, and the rows that they leave."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from shiwu import Client
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase, Progress, Runner
from shiwu.backfill.sources.opening import open_source
from shiwu.backfill.state import BackfillState
from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.parts import Objects
from tests.support.processes import Process, clean_environment


class BackfillProcess(Process):
    """`shiwu backfill ARGS…` as a process."""

    def __init__(
        self, *args: str, redis_url: str, folder: Path, env: Mapping[str, str] | None = None, name: str = "backfill"
    ) -> None:
        command = [sys.executable, "-m", "shiwu.cli", "--redis-url", redis_url, "backfill", *args]
        super().__init__(command, name=name, folder=folder, env=clean_environment(env or {}))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parts of a finished backfill, which must be those of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [part["name"] for part in manifest["parts"]]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json", "summary.json"])
    rows: list[dict[str, Any]] = []
    for part in manifest["parts"]:
        path = folder / part["name"]
        found = parquet_rows(path) if manifest["format"] == "parquet" else json_rows(path)
        assert (len(found), path.stat().st_size) == (part["rows"], part["bytes"])
        rows += found
    assert len(rows) == manifest["rows"]
    return rows


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one part in JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one part in Parquet."""
    import pyarrow.parquet as pq  # noqa: PLC0415 most tests need none

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def references_of(folder: Path) -> Counter[str]:
    """How often each reference has a row; rows of lines without one have an empty text."""
    return Counter(reference_of(row) for row in rows_of(folder))


def reference_of(row: dict[str, Any]) -> str:
    """The reference of a row of either format."""
    found: str | None = row["reference"] if "reference" in row else row.get("image", {}).get("reference")
    return found or ""


def summary_of(folder: Path) -> dict[str, Any]:
    """summary.json."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


class LocalBackfill:
    """Backfills in the process of the test, on one Redis or over shards.

    `run` does what the command `start` does, without its display.
    """

    def __init__(self, redis_url: str, *, objects: Objects | None = None, timeout_s: float = 5.0) -> None:
        self.url = redis_url
        self.client = Client(redis_url, timeout_s=timeout_s)
        self._shards = open_shards(redis_url, PoolOptions(timeout_s=timeout_s, retries=3))
        self._no_retry = open_shards(redis_url, PoolOptions(timeout_s=timeout_s))
        self.redis = self._shards[0]
        self._objects = objects or Objects({})
        self.shown: list[Progress] = []
        self.is_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for shard in (*self._shards, *self._no_retry):
            shard.close()

    def state(self, name: str) -> BackfillState:
        """The state of a backfill."""
        return BackfillState(self.redis, name)

    def run(self, name: str, plan: Plan, pace: Pace | None = None, **options: Any) -> Phase:
        """Start a backfill, or go on with it, and run it to its end; `options` are those of `Runner`."""
        pace = pace or Pace()
        state = self.state(name)
        saved = state.read()
        if saved is None:
            state.create(plan, pace, now_ms=self.client.server_time_ms())
        else:
            state.reopen(pace, is_new_pass=pace.is_missing_only and saved.phase != "running")
        usual: dict[str, Any] = {
            "open_the_source": lambda saved: open_source(saved.plan.source, objects=self._objects),
            "on_progress": self.shown.append,
            "is_stopping": lambda: self.is_stopping,
        }
        connections = (self._shards, self._no_retry)
        runner = Runner(
            client=self.client,
            connections=connections,
            name=name,
            pace=pace,
            objects=self._objects,
            **(usual | options),
        )
        return runner.run()


def write_list(path: Path, count: int, *, broken_every: int = 0) -> Path:
    """JSON lines with different images, some of them named `broken`."""
    names = [
        f"{number:05}-broken.jpg" if broken_every and number % broken_every == 0 else f"{number:05}.jpg"
        for number in range(count)
    ]
    path.write_text("".join(json.dumps({"image": f"s3://b/{name}"}) + "\n" for name in names), encoding="utf-8")
    return path
