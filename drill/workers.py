"""Drills that kill, stop and restart workers, and kill loaders."""

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

from drill.drill_run import LEASE_S, TAKEOVER_S, DrillRun, Outcome, wrong
from shiwu.contract import COUNTERS

PROMISED_S = LEASE_S + TAKEOVER_S
GRACE_S = 8.0
LOADER_READY_AGE_S = 2.0
"""Age at which a loader is ready, also on a busy machine."""
MIN_ROUNDS_WITH_LATE_ANSWER = 10
"""Rounds of the drill `hang` after which a late answer must have been seen."""


def kill(run: DrillRun) -> Outcome:
    """SIGKILL of a worker under load, another one in each round; the remaining worker takes over its jobs."""
    victim = run.start_worker(slots=run.jobs)
    for number in range(1, run.rounds + 1):
        survivor = run.start_worker(slots=run.jobs)
        base = len(run.sent)
        run.enqueue(run.jobs)
        run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 2)))
        victim.kill()
        run.time_takeover(victim)
        run.wait_answers(number * run.jobs)
        victim = survivor
    return run.finish("kill", promised_s=PROMISED_S)


def kill_loaders(run: DrillRun) -> Outcome:
    """SIGKILL of loaders at random moments: their images are retried, and all are tagged."""
    worker = run.start_worker(loaders=2, load_timeout_s=20)
    pause = threading.Event()
    # One that takes long to decode, so that a kill meets it.
    (run.folder / "large.jpg").write_bytes(pictures.large_jpeg(pictures.picture()))
    large = (run.folder / "large.jpg").as_uri()
    for _ in range(run.rounds):
        # An image whose loader is killed again, in its isolated retry, looks like one that crashes its decoder.
        wait_until(partial(_all_answered, run, worker), timeout_s=120, what="the answers of the round before")
        if not worker.is_running:
            break
        # Only ready loaders: five loaders in a row that exit before they are ready end the worker, as intended.
        ready = wait_until(
            lambda: [pid for pid in loaders_of(worker.pid) if age_s(pid) > LOADER_READY_AGE_S], timeout_s=30
        )
        run.enqueue(max(1, run.jobs // 10), [large])
        # The images of a round keep the loaders busy for about 0.2 s from the claim on.
        wait_until(lambda: run.held(worker), timeout_s=30, every_s=0.002, what="a claim of the large images")
        pause.wait(run.rng.uniform(0.0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.rng.choice(ready), signal.SIGKILL)
            run.breaks += 1
    outcome = run.finish("loaders", promised_s=PROMISED_S)
    if not re.search(r'"held": [1-9].*"loader_replaced"', worker.log_text()):
        outcome = wrong(outcome, f"none of {run.breaks} kills met a picture")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _all_answered(run: DrillRun, worker: WorkerProcess) -> bool:
    return not worker.is_running or run.answered() - run.answered_before >= len(run.sent)


def hang(run: DrillRun) -> Outcome:
    """SIGSTOP for longer than the lease, then SIGCONT: others have its jobs, and its late answers are discarded."""
    survivor, victim = run.start_workers(2, slots=min(512, run.jobs))
    for _ in range(run.rounds):
        base = len(run.sent)
        run.enqueue(run.jobs)
        run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 3)))
        victim.signal(signal.SIGSTOP)
        try:
            run.time_takeover(victim)
            run.wait_answers(base + run.jobs)
        finally:
            victim.signal(signal.SIGCONT)
    are_running = victim.is_running and survivor.is_running
    outcome = run.finish("hang", promised_s=PROMISED_S)
    if run.rounds >= MIN_ROUNDS_WITH_LATE_ANSWER and not outcome.discarded:
        outcome = wrong(outcome, "no late answer was discarded: no worker was stopped while it had jobs")
    return outcome if are_running else wrong(outcome, "a worker exited")


def rolling(run: DrillRun) -> Outcome:
    """SIGTERM to one of three workers after the other under load; sometimes a second SIGTERM, or no grace at all."""
    running = run.start_workers(3, grace_s=GRACE_S, log_level="info")
    all_workers, bad = list(running), list[str]()
    for number in range(run.rounds):
        base = len(run.sent)
        run.enqueue(run.jobs)
        run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 3)))
        leaving = running.pop(0)
        began_s = time.monotonic()
        leaving.terminate()
        if number % 3 == 1:
            wait_until(partial(lambda leaving: "stopping" in leaving.log_text(), leaving), timeout_s=10)
            leaving.terminate()
        code = leaving.wait(timeout_s=GRACE_S + 20)
        run.recoveries.append(time.monotonic() - began_s)
        if code != 0:
            bad.append(f"{leaving.name} ended with {code}")
        if run.held(leaving):
            bad.append(f"{leaving.name} left {run.held(leaving)} claims")
        # Every third worker is given no time at all: it releases what it holds.
        running.append(run.start_worker(grace_s=0 if number % 3 == 2 else GRACE_S, log_level="info"))
        all_workers.append(running[-1])
    reaped = int(run.client.hget(COUNTERS, "reaped") or 0) - run.counters_before["reaped"]
    if reaped:
        bad.append(f"{reaped} jobs had to be reaped")
    outcome = run.finish("rolling", promised_s=GRACE_S, wrong=bad)
    if outcome.rerun or outcome.discarded:
        outcome = wrong(outcome, f"{outcome.rerun} jobs were retried, {outcome.discarded} answered again")
    return wrong(outcome, *_not_by_one(run, all_workers))


def _not_by_one(run: DrillRun, workers: Sequence[WorkerProcess]) -> list[str]:
    """Complaints about jobs that do not have exactly one log line of one worker about their answer."""
    lines = [line for worker in workers for line in worker.log_text().splitlines() if '"tagged"' in line]
    log_lines = Counter(str(json.loads(line)["id"]) for line in lines)
    others = [job_id for job_id in run.sent if log_lines[job_id] != 1]
    return [f"not answered by one worker: {others[:5]} of {len(others)}"] if others else []
