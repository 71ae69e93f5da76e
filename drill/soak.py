"""A drill of steady work with blips, at whose end the worker must not have grown."""

from __future__ import annotations

import threading
import time
from statistics import median
from typing import Final

from tests.support.family import rss_bytes

from drill.field import Field, Outcome, wrong

GROWTH: Final = 1.10
"""Most that the worker's memory may be at the end of what it was after the first jobs."""
EVERY_S: Final = 0.25
CHUNK_SIZE: Final = 10
BLIP: Final = 0.1
"""Share of the portions with which a fault comes."""


def soak(field: Field) -> Outcome:
    """Steady work, with connections killed and scripts forgotten now and then: the worker's memory stays as it is."""
    worker = field.worker()
    field.enqueue(field.jobs)
    field.wait_answers(field.jobs)
    pause, sizes, blips = threading.Event(), list[int](), 0
    until_s = time.monotonic() + field.lasts_s
    while time.monotonic() < until_s and worker.is_running:
        field.enqueue(CHUNK_SIZE)
        pause.wait(EVERY_S)
        sizes.append(rss_bytes(worker.pid))
        if field.chance.random() < BLIP:
            blips += 1
            field.client.script_flush()
            for one in field.client.client_list():
                if one["name"] == f"shiwu-{worker.name}":
                    field.client.client_kill_filter(_id=one["id"])
    field.wait_answers(len(field.sent))
    part = max(1, len(sizes) // 5)
    first, last = median(sizes[:part]), median(sizes[-part:])
    notes = (
        f"{first / 1e6:.0f} MB at the beginning, {last / 1e6:.0f} MB at the end of {field.lasts_s:g} s, {blips} blips"
    )
    outcome = field.finish("soak", promised_s=0, notes=notes)
    if last > GROWTH * first:
        outcome = wrong(outcome, f"the worker grew: {notes}")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")
