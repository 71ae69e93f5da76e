"""Another program takes the GPU's memory: before a worker starts, and in the middle of its work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import torch
from tests.support.waiting import wait_until

from bench.card.hog import taking_all_but
from bench.card.load import READY_S, opened
from bench.card.measure import Measures
from shiwu_worker.errors import ExitCode

START_MIB: Final = 2_500
WORKING_MIB: Final = 64
MAX_BATCH: Final = 512
SHOWN: Final = frozenset({"batch_size_does_not_fit", "batch_size_changed", "graph_not_captured", "worker_failed"})


def measures(*, tiny: bool) -> Measures:
    """Both times; on a CPU the other program takes no memory."""
    yield "start in little memory", lambda: _start(tiny=tiny)
    yield "memory taken while it works", lambda: _working(tiny=tiny)


def _start(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load, taking_all_but(START_MIB, folder=load.folder):
        settings: dict[str, Any] = {} if tiny else {"max_batch": MAX_BATCH}
        with load.worker("small", **settings) as worker:
            wait_until(lambda: worker.is_ready or not worker.is_running, timeout_s=READY_S, what="a start or an end")
            found: dict[str, Any] = {"ready": worker.is_ready, "exit_code": worker.exit_code, **_pressure()}
            found["events"] = _events(worker.log_text())
            if worker.is_ready:
                return found | load.count(load.send("start"))
            if worker.exit_code != ExitCode.MODEL:
                raise AssertionError(f"expected a worker, or exit code 65, got {found}: {worker.log_tail(lines=5)}")
            return found


def _working(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load, load.worker("pressed") as worker:
        worker.wait_ready(timeout_s=READY_S)
        ids = load.send("pressed")
        load.wait_some()
        with taking_all_but(WORKING_MIB, folder=load.folder):
            ids += load.send("beside")
            found = load.count(ids)
        if not worker.is_running:
            raise AssertionError(f"expected a worker that goes on, got {worker.exit_code}: {worker.log_tail(lines=5)}")
        return found | _pressure() | {"events": _events(worker.log_text())}


def _pressure() -> dict[str, Any]:
    return {"memory was taken": torch.cuda.is_available()}


def _events(text: str) -> list[Mapping[str, Any]]:
    """What the worker's log says of memory, the last lines first."""
    found: list[Mapping[str, Any]] = []
    for line in reversed(text.splitlines()):
        if any(name in line for name in SHOWN):
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"line": line[:300]})
    return found[:10]
