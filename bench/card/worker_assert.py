"""A working worker whose GPU is lost: it gives its jobs back and exits with 67, and another worker does them."""

from __future__ import annotations

import time
from typing import Any

from bench.card.load import READY_S, opened
from bench.card.measure import Measures
from shiwu_worker.errors import ExitCode

EXIT_S = 30.0


def measures(*, tiny: bool) -> Measures:
    """One lost device."""
    yield "device assert", lambda: _assert(tiny=tiny)


def _assert(*, tiny: bool) -> dict[str, Any]:
    with opened(tiny=tiny) as load:
        with load.worker("lost") as worker:
            worker.wait_ready(timeout_s=READY_S)
            ids = load.send("assert")
            load.wait_some()
            load.fault("lost", "assert")
            began_s = time.monotonic()
            exit_code = worker.wait(timeout_s=EXIT_S)
            exit_s = round(time.monotonic() - began_s, 2)
            tail = worker.log_tail(lines=5)
        claims = load.claims()
        if exit_code != ExitCode.DEVICE or claims:
            raise AssertionError(f"expected exit code 67 and no claims, got {exit_code} and {claims}: {tail}")
        with load.worker("next") as other:
            other.wait_ready(timeout_s=READY_S)
            return {"exit_code": exit_code, "exit_s": exit_s, "claims left": claims} | load.count(ids)
