"""All faults together, in random order from the seed."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from tests.support import pictures
from tests.support.family import loaders_of
from tests.support.fault_proxy import FaultProxy
from tests.support.picture_server import PictureServer
from tests.support.processes import WorkerProcess
from tests.support.waiting import wait_until

from drill.device import DEVICE_LOST
from drill.drill_run import DrillRun, Outcome, wrong
from drill.inputs import KINDS, flaky_replies, mark, poison_env, wrong_statuses
from drill.workers import PROMISED_S
from shiwu.contract import QUARANTINE_OWNER

ROLES: Final = ("plain", "faulty", "far")
"""The workers: an ordinary one, one whose encoder fails now and then, one behind a proxy that cuts its connections."""
FAULTS: Final = ("kill", "hang", "loader", "term", "twice", "redis", "cut", "cut", "duplicates", "loader")
FLAKY_PERCENT: Final = 5
"""Images in a hundred that come from a source with failures."""


@dataclass
class _Setup:
    """The workers by role, the proxy in front of one of them, the source, and what was seen so far."""

    run: DrillRun
    proxy: FaultProxy
    source: PictureServer
    workers: dict[str, WorkerProcess] = dataclasses.field(default_factory=dict)
    bad_ids: set[str] = dataclasses.field(default_factory=set)
    wrong: list[str] = dataclasses.field(default_factory=list)
    seen: Counter[str] = dataclasses.field(default_factory=Counter)

    def start(self, role: str) -> WorkerProcess:
        """Start the worker of a role, in place of one that ended; it is not ready yet."""
        options: dict[str, Any] = {
            "env": poison_env() | ({"DRILL_SEED": str(self.run.rng.randrange(10**9))} if role == "faulty" else {}),
            "allow_hosts": self.source.host,
            "fetch_timeout_s": 3,
            "read_timeout_s": 1,
            "load_timeout_s": 4,
            "grace_s": 5,
            "loaders": 1,
            # A loader that the drill kills twice, the second time alone, looks like an image that crashes its decoder.
            "retry": "decoder_crashed=3:0.3:1",
        }
        if role == "faulty":
            options["module"] = "drill.device"
        if role == "far":
            options["url"] = self.proxy.url
        self.workers[role] = self.run.start_worker(ready=False, **options)
        return self.workers[role]

    def end(self, role: str, code: int, *allowed: int) -> None:
        """Record how a worker exited, and start another in its place."""
        if code not in allowed:
            self.wrong.append(f"{self.workers[role].name} ({role}) ended with {code}")
        self.start(role).wait_ready()

    def victim(self) -> str:
        """The role of a worker that may be broken now.

        Not the owner of the quarantine: its jobs have lost two workers, and with the third they end without tags, as
        promised.
        """
        owner = str(self.run.client.get(QUARANTINE_OWNER))
        return self.run.rng.choice([role for role in ROLES if f"'{self.workers[role].name}." not in owner])


def together(run: DrillRun) -> Outcome:
    """Faults of workers, loaders, Redis, connections, images, sources and the device, and duplicates, at random."""
    setup = _Setup(run, run.enter(FaultProxy(run.url)), run.enter(PictureServer()))
    for role in ROLES:
        setup.start(role)
    for worker in setup.workers.values():
        worker.wait_ready()
    bad = [mark(run, kind) for kind in KINDS]
    body = pictures.jpeg(pictures.picture())
    pause, faults = threading.Event(), list[str]()
    until_s = time.monotonic() + run.lasts_s
    while time.monotonic() < until_s:
        for _ in range(run.jobs // 100):
            begin = len(run.sent)
            run.enqueue(99 - FLAKY_PERCENT)
            urls = [
                setup.source.serve(f"/{begin + number}.jpg", *flaky_replies(run, body))
                for number in range(FLAKY_PERCENT)
            ]
            for url in urls:
                run.enqueue(1, [url])
            setup.bad_ids.update(run.enqueue(1, [run.rng.choice(bad)]))
        pause.wait(run.rng.uniform(0.3, 2.0))
        faults = faults or run.rng.sample(FAULTS, len(FAULTS))
        kind = faults.pop()
        setup.seen[kind] += 1
        _break(setup, kind)
        for role, worker in list(setup.workers.items()):
            if (code := worker.exit_code) is not None:
                setup.end(role, code, *((DEVICE_LOST,) if role == "faulty" else ()))
        # The backlog stays small enough for the workers to finish in the end.
        while len(run.sent) - (run.answered() - run.answered_before) > 20 * run.jobs:
            pause.wait(0.2)
    return _finish(setup)


def _finish(setup: _Setup) -> Outcome:
    setup.proxy.heal()
    # The faulty worker may lose its device at the end, and then nothing else would finish the jobs.
    if setup.workers["plain"].exit_code is not None:
        setup.end("plain", setup.workers["plain"].exit_code or 0)
    seen = ", ".join(f"{kind} {count}" for kind, count in sorted(setup.seen.items()))
    notes = f"{seen}; {setup.proxy.cuts} cuts, {len(setup.bad_ids)} bad images, {setup.run.lasts_s / 60:g} minutes"
    outcome = setup.run.finish(
        "together", promised_s=PROMISED_S, timeout_s=600, notes=notes, wrong=setup.wrong, only=()
    )
    return wrong(outcome, *wrong_statuses(outcome, setup.bad_ids))


def _break(setup: _Setup, kind: str) -> None:
    run, rng, role = setup.run, setup.run.rng, setup.victim()
    victim = setup.workers[role]
    if kind == "duplicates":
        # Only of good images: a duplicate has an image of its own, and either of the two may be claimed first.
        good_ids = [job_id for job_id in run.sent if job_id not in setup.bad_ids]
        run.enqueue(100, ids=rng.sample(good_ids, min(100, len(good_ids))))
    elif kind == "loader":
        for pid in loaders_of(victim.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
    elif kind == "redis":
        if run.server is not None:
            run.server.kill()
            run.server.restart()
    elif kind == "cut":
        (setup.proxy.cut_request_after if rng.random() < 0.5 else setup.proxy.cut_reply_after)(rng.randrange(3000))
    elif kind == "hang":
        victim.signal(signal.SIGSTOP)
        try:
            run.time_until(lambda: not run.held(victim), timeout_s=PROMISED_S + 10)
        finally:
            victim.signal(signal.SIGCONT)
    else:
        _end(setup, role, kind)


def _end(setup: _Setup, role: str, kind: str) -> None:
    """SIGKILL, SIGTERM, or SIGTERM twice; then start another worker in its place."""
    run, victim = setup.run, setup.workers[role]
    if kind == "kill":
        victim.kill()
    else:
        victim.terminate()
        if kind == "twice":
            wait_until(lambda: not victim.ready_file.exists() or not victim.is_running, timeout_s=30)
            victim.terminate()
        victim.wait(timeout_s=60)
    run.time_until(lambda: not run.held(victim), timeout_s=PROMISED_S + 10)
    allowed = (-signal.SIGKILL,) if kind == "kill" else (0, DEVICE_LOST) if role == "faulty" else (0,)
    setup.end(role, victim.wait(timeout_s=1), *allowed)
