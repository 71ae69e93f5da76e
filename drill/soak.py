"""A drill of steady work with short faults, after which the worker must not use more memory."""

from __future__ import annotations

import threading
import time
from statistics import median
from typing import Final

from tests.support.family import rss_bytes

from drill.drill_run import DrillRun, Outcome, wrong

MAX_GROWTH: Final = 1.10
"""Memory of the worker at the end ÷ that after the first jobs."""
EVERY_S: Final = 0.25
CHUNK_SIZE: Final = 10
FAULT_SHARE: Final = 0.1
"""Share of the portions with a fault."""


def soak(run: DrillRun) -> Outcome:
    """Steady work, with killed connections and flushed scripts now and then: the worker's memory does not grow."""
    worker = run.start_worker()
    run.enqueue(run.jobs)
    run.wait_answers(run.jobs)
    pause, sizes, faults = threading.Event(), list[int](), 0
    until_s = time.monotonic() + run.lasts_s
    while time.monotonic() < until_s and worker.is_running:
        run.enqueue(CHUNK_SIZE)
        pause.wait(EVERY_S)
        sizes.append(rss_bytes(worker.pid))
        if run.rng.random() < FAULT_SHARE:
            faults += 1
            run.client.script_flush()
            for connection in run.client.client_list():
                if connection["name"] == f"shiwu-{worker.name}":
                    run.client.client_kill_filter(_id=connection["id"])
    run.wait_answers(len(run.sent))
    part = max(1, len(sizes) // 5)
    first, last = median(sizes[:part]), median(sizes[-part:])
    notes = (
        f"{first / 1e6:.0f} MB at the beginning, {last / 1e6:.0f} MB at the end of {run.lasts_s:g} s, {faults} faults"
    )
    outcome = run.finish("soak", promised_s=0, notes=notes)
    if last > MAX_GROWTH * first:
        outcome = wrong(outcome, f"the worker grew: {notes}")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")
