"""The files that a backfill writes at its end: the list of its parts, and its counts."""

from __future__ import annotations

import json
from typing import Any, Final

from shiwu.backfill.state import Saved
from shiwu.contract import moment

VERSION: Final = 1


def manifest_of(name: str, saved: Saved) -> bytes:
    """manifest.json: all parts with their rows, sizes and checksums."""
    parts = [
        {"name": part.name, "rows": part.rows, "bytes": part.bytes, "sha256": part.sha256}
        for part in saved.parts.values()
    ]
    rows = sum(part.rows for part in saved.parts.values())
    return _json({"version": VERSION, "backfill": name, "format": saved.plan.format, "rows": rows, "parts": parts})


def report_of(name: str, saved: Saved, *, phase: str | None = None, ended_ms: float | None = None) -> dict[str, Any]:
    """The counts of a backfill: what was read and sent, answers by status and error code, rate, times, models."""
    ended_ms = saved.ended_ms if ended_ms is None else ended_ms
    last_ms = ended_ms or saved.heartbeat_ms
    seconds = max(0.0, (last_ms - saved.started_ms) / 1000)
    counts = saved.totals.summary()
    return {
        "version": VERSION,
        "backfill": name,
        "phase": phase or saved.phase,
        "source": saved.plan.source,
        "request": saved.plan.fields,
        "started_at": moment(saved.started_ms).isoformat(),
        "ended_at": None if ended_ms is None else moment(ended_ms).isoformat(),
        "seconds": round(seconds, 1),
        "answers_per_second": round(counts["answered"] / seconds, 1) if seconds else None,
        **saved.counts,
        **counts,
        "parts": len(saved.parts),
        "rows": sum(part.rows for part in saved.parts.values()),
    }


def summary_of(name: str, saved: Saved, *, phase: str, ended_ms: float) -> bytes:
    """summary.json."""
    return _json(report_of(name, saved, phase=phase, ended_ms=ended_ms))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
