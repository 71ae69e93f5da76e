"""Drills that break workers: killed, hung, restarted; and their loaders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from tests.support import pictures
from tests.support.family import age_s, loaders_of
from tests.support.processes import WorkerProcess
from tests.support.waiting import wait_until

from drill.field import LEASE_S, TAKEOVER_S, Field, Outcome, wrong
from shiwu.contract import COUNTERS

PROMISED_S = LEASE_S + TAKEOVER_S
GRACE_S = 8.0
GROWN_S = 2.0
"""Age at which a loader is surely ready, also on a busy machine."""
SURELY_DISCARDED = 10
"""Rounds of the drill `hang` after which a late answer must have been seen."""


def kill(field: Field) -> Outcome:
    """SIGKILL of a worker under load, each round another one; a survivor takes its jobs over."""
    victim = field.worker(slots=field.jobs)
    for number in range(1, field.rounds + 1):
        survivor = field.worker(slots=field.jobs)
        base = len(field.sent)
        field.enqueue(field.jobs)
        field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 2)))
        victim.kill()
        field.time_takeover(victim)
        field.wait_answers(number * field.jobs)
        victim = survivor
    return field.finish("kill", promised_s=PROMISED_S)


def kill_loaders(field: Field) -> Outcome:
    """SIGKILL of loaders at random moments: their pictures are tried again, and none is blamed."""
    worker = field.worker(loaders=2, load_timeout_s=20)
    pause = threading.Event()
    # One that takes long to decode, so that a kill meets it.
    (field.folder / "large.jpg").write_bytes(pictures.large_jpeg(pictures.picture()))
    large = (field.folder / "large.jpg").as_uri()
    for _ in range(field.rounds):
        # Whose loader is killed again, when it is loaded alone after the first kill, can't be told from poison.
        wait_until(partial(_all_answered, field, worker), timeout_s=120, what="the answers of the round before")
        if not worker.is_running:
            break
        # Grown ones: five loaders in a row that die before they are ready end the worker, as they should.
        grown = wait_until(lambda: [pid for pid in loaders_of(worker.pid) if age_s(pid) > GROWN_S], timeout_s=30)
        field.enqueue(max(1, field.jobs // 10), [large])
        pause.wait(field.chance.uniform(0.0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(field.chance.choice(grown), signal.SIGKILL)
            field.breaks += 1
    outcome = field.finish("loaders", promised_s=PROMISED_S)
    if not re.search(r'"held": [1-9].*"loader_replaced"', worker.log_text()):
        outcome = wrong(outcome, f"none of {field.breaks} kills met a picture")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _all_answered(field: Field, worker: WorkerProcess) -> bool:
    return not worker.is_running or field.answered() - field.answered_before >= len(field.sent)


def hang(field: Field) -> Outcome:
    """SIGSTOP for longer than the lease, then SIGCONT: its jobs are others' by then, its late answers are discarded."""
    survivor, victim = field.fleet(2, slots=min(512, field.jobs))
    for _ in range(field.rounds):
        base = len(field.sent)
        field.enqueue(field.jobs)
        field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 3)))
        victim.signal(signal.SIGSTOP)
        try:
            field.time_takeover(victim)
            field.wait_answers(base + field.jobs)
        finally:
            victim.signal(signal.SIGCONT)
    alive = victim.is_running and survivor.is_running
    outcome = field.finish("hang", promised_s=PROMISED_S)
    if field.rounds >= SURELY_DISCARDED and not outcome.discarded:
        outcome = wrong(outcome, "no late answer was discarded: nobody was stopped while it worked")
    return outcome if alive else wrong(outcome, "a worker did not survive")


def rolling(field: Field) -> Outcome:
    """SIGTERM to one of three workers after the other under load; sometimes a second SIGTERM, or no grace at all."""
    fleet = field.fleet(3, grace_s=GRACE_S, log_level="info")
    everybody, bad = list(fleet), list[str]()
    for number in range(field.rounds):
        base = len(field.sent)
        field.enqueue(field.jobs)
        field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 3)))
        leaving = fleet.pop(0)
        began_s = time.monotonic()
        leaving.terminate()
        if number % 3 == 1:
            wait_until(partial(lambda leaving: "stopping" in leaving.log_text(), leaving), timeout_s=10)
            leaving.terminate()
        code = leaving.wait(timeout_s=GRACE_S + 20)
        field.recoveries.append(time.monotonic() - began_s)
        if code != 0:
            bad.append(f"{leaving.name} ended with {code}")
        if field.held(leaving):
            bad.append(f"{leaving.name} left {field.held(leaving)} claims behind")
        # Every third worker is given no time at all: it releases what it holds.
        fleet.append(field.worker(grace_s=0 if number % 3 == 2 else GRACE_S, log_level="info"))
        everybody.append(fleet[-1])
    reaped = int(field.client.hget(COUNTERS, "reaped") or 0) - field.counters_before["reaped"]
    if reaped:
        bad.append(f"{reaped} jobs had to be reaped")
    outcome = field.finish("rolling", promised_s=GRACE_S, wrong=bad)
    if outcome.rerun or outcome.discarded:
        outcome = wrong(outcome, f"{outcome.rerun} jobs were tried again, {outcome.discarded} answered again")
    return wrong(outcome, *_not_by_one(field, everybody))


def _not_by_one(field: Field, workers: Sequence[WorkerProcess]) -> list[str]:
    """Complaints about jobs that not exactly one worker says, in one line of its log, to have answered."""
    lines = [line for worker in workers for line in worker.log_text().splitlines() if '"tagged"' in line]
    said = Counter(str(json.loads(line)["id"]) for line in lines)
    others = [job_id for job_id in field.sent if said[job_id] != 1]
    return [f"not answered by one worker: {others[:5]} of {len(others)}"] if others else []
