"""SIGTERM under load: the worker finishes or gives back what it holds and exits with 0; another one does the rest."""

from __future__ import annotations

import time
from typing import Any

from bench.card.load import READY_S, opened
from bench.card.measure import Measures

GRACE_S = 5
EXIT_S = GRACE_S + 23.0


def measures(*, tiny: bool) -> Measures:
    """One drained worker."""
    yield "SIGTERM under load", lambda: _sigterm(tiny=tiny)


def _sigterm(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load:
        with load.worker("drained", grace_s=GRACE_S) as worker:
            worker.wait_ready(timeout_s=READY_S)
            ids = load.send("sigterm")
            load.wait_some()
            worker.terminate()
            began_s = time.monotonic()
            exit_code = worker.wait(timeout_s=EXIT_S)
            exit_s = round(time.monotonic() - began_s, 2)
        claims = load.claims()
        if exit_code or claims:
            raise AssertionError(f"expected exit code 0 and no claims, got {exit_code} and {claims}")
        with load.worker("next") as other:
            other.wait_ready(timeout_s=READY_S)
            return {"exit_code": exit_code, "exit_s": exit_s, "claims left": claims} | load.count(ids)
