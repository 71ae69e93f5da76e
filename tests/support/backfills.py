"""Backfills as tests start them, and the rows that they leave."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
