"""CPU time of each thread of a working worker for an image, from /proc: who holds Python's lock."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from tests.support import drill

from bench import usage
from bench.card.load import READY_S, opened
from bench.card.measure import Measures
from shiwu_worker.runtime import proc

SECONDS: Final = 3.0
MIN_US: Final = 0.5
"""Threads that take less for an image are summed up as `other`."""


def measures(*, tiny: bool) -> Measures:
    """One worker under load."""
    yield "µs of CPU for an image", lambda: _threads(tiny=tiny)


def _threads(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load, load.worker("watched") as worker:
        worker.wait_ready(timeout_s=READY_S)
        ids = load.send("threads")
        load.wait_some()
        before, answered, began_s = _cpu_s(worker.pid), drill.answered(load.client), time.monotonic()
        loaders_s = usage.cpu_s(usage.descendants(worker.pid))
        pause = threading.Event()
        while time.monotonic() - began_s < SECONDS and drill.answered(load.client) < len(ids):
            pause.wait(0.02)
        after, seconds = _cpu_s(worker.pid), time.monotonic() - began_s
        images = max(1, drill.answered(load.client) - answered)
        loaders_s = usage.cpu_s(usage.descendants(worker.pid)) - loaders_s
        load.count(ids)
    spent = {name: (after[name] - before.get(name, 0.0)) / images * 1e6 for name in after}
    shown = {name: round(us, 1) for name, us in sorted(spent.items(), key=lambda item: -item[1]) if us >= MIN_US}
    return {
        "images": images,
        "images/s": round(images / seconds, 1),
        "worker": shown | {"other": round(sum(us for us in spent.values() if us < MIN_US), 1)},
        "loaders": round(loaders_s / images * 1e6, 1),
    }


def _cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of each name of a thread, of all threads of that name."""
    found: dict[str, float] = defaultdict(float)
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        if name := proc.read_text(path.with_name("comm")).strip():
            found[name] += proc.cpu_s(proc.stat_fields(str(path)))
    return found
