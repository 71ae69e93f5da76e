"""All of it together, in random order from the seed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from drill.field import Field, Outcome
from drill.inputs import KINDS, _mark
from drill.workers import PROMISED_S, loaders_of

FLEET = 3
BREAKS = ("kill", "hang", "loader", "term", "redis", "redis", "duplicates", "loader")


def together(field: Field) -> Outcome:
    """Workers killed, hung and restarted, loaders killed, Redis killed, poison, copies: for minutes, at random."""
    env = {"PYTHONPATH": str(Path(__file__).parent / "poison"), "DRILL_POISON": "1"}

    options: dict[str, Any] = {"env": env, "load_timeout_s": 2, "grace_s": 5, "loaders": 1, "torch_threads": 1}

    bad = [_mark(field, kind) for kind in KINDS]
    fleet = field.fleet(FLEET, **options)
    pause, seen = threading.Event(), dict.fromkeys(BREAKS, 0)
    until_s = time.monotonic() + field.minutes * 60
    wrong: list[str] = []
    while time.monotonic() < until_s:
        for _ in range(field.jobs // 100):
            field.enqueue(99)
            field.enqueue(1, [field.chance.choice(bad)])
        pause.wait(field.chance.uniform(0.3, 2.0))
        kind = field.chance.choice(BREAKS)
        seen[kind] += 1
        victim = field.chance.choice(fleet)
        if kind == "duplicates":
            field.enqueue(100, ids=field.chance.sample(field.sent, min(100, len(field.sent))))
        elif kind == "loader":
            for pid in loaders_of(victim.pid)[:1]:
                os.kill(pid, signal.SIGKILL)
        elif kind == "redis":
            if field.server is not None:
                field.server.kill()
                field.server.restart()
        elif kind == "hang":
            victim.signal(signal.SIGSTOP)
            field.time_until(lambda victim=victim: not field.held(victim), timeout_s=PROMISED_S + 10)  # type: ignore[misc]
            victim.signal(signal.SIGCONT)
        else:
            victim.terminate() if kind == "term" else victim.kill()
            if kind == "term" and (code := victim.wait(timeout_s=60)) != 0:
                wrong.append(f"{victim.name} ended with {code} after SIGTERM")
            field.time_until(lambda victim=victim: not field.held(victim), timeout_s=PROMISED_S + 10)  # type: ignore[misc]
            fleet.remove(victim)
            fleet.append(field.worker(**options))
        ended = [worker for worker in fleet if not worker.is_running]
        if ended:
            wrong += [f"{worker.name} ended with {worker.exit_code}" for worker in ended]
            fleet = [worker for worker in fleet if worker.is_running] + field.fleet(len(ended), **options)
        # The backlog stays what the fleet can work off in the end.
        while len(field.sent) - (field.answered() - field.answered_before) > 20 * field.jobs:
            pause.wait(0.2)
    notes = ", ".join(f"{kind} {count}" for kind, count in seen.items())
    outcome = field.finish("together", promised_s=PROMISED_S, timeout_s=600, notes=notes, wrong=wrong)
    return replace(outcome, notes=f"{notes}; {field.minutes:g} minutes")
