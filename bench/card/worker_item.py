"""A worker whose model reads a number back in each pass: it has no graphs, says so, and answers."""

from __future__ import annotations

from typing import Any

import torch

from bench.card.load import READY_S, opened
from bench.card.measure import Measures


def measures(*, tiny: bool) -> Measures:
    """One worker."""
    yield "planted .item()", lambda: _item(tiny=tiny)


def _item(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load, load.worker("item", fault="item") as worker:
        worker.wait_ready(timeout_s=READY_S)
        found = load.count(load.send("item"))
        was_told = "graph_not_captured" in worker.log_text()
        if torch.cuda.is_available() and not was_told:
            raise AssertionError("expected the log event graph_not_captured, got none")
        return found | {"graph_not_captured logged": was_told, "still runs": worker.is_running}
