"""All of it together, in random order from the seed."""

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
from drill.field import Field, Outcome, wrong
from drill.inputs import KINDS, mark, misjudged, moody, poison_env
from drill.workers import PROMISED_S
from shiwu.contract import QUARANTINE_OWNER

ROLES: Final = ("plain", "faulty", "far")
"""The workers: an ordinary one, one whose encoder fails now and then, one behind a proxy that cuts its connections."""
BREAKS: Final = ("kill", "hang", "loader", "term", "twice", "redis", "cut", "cut", "duplicates", "loader")
MOODY: Final = 5
"""Pictures in a hundred that come from a source with moods."""


@dataclass
class _Stage:
    """Who plays: the workers by role, the proxy before one of them, the source; and what is known of them."""

    field: Field
    proxy: FaultProxy
    source: PictureServer
    workers: dict[str, WorkerProcess] = dataclasses.field(default_factory=dict)
    guilty: set[str] = dataclasses.field(default_factory=set)
    wrong: list[str] = dataclasses.field(default_factory=list)
    seen: Counter[str] = dataclasses.field(default_factory=Counter)

    def start(self, role: str) -> WorkerProcess:
        """Start the worker of a role, in place of one that ended; it is not ready yet."""
        options: dict[str, Any] = {
            "env": poison_env() | ({"DRILL_SEED": str(self.field.chance.randrange(10**9))} if role == "faulty" else {}),
            "allow_hosts": self.source.host,
            "fetch_timeout_s": 3,
            "read_timeout_s": 1,
            "load_timeout_s": 4,
            "grace_s": 5,
            "loaders": 1,
            # Whose loader a stranger kills twice, the second time alone, can't be told from poison.
            "retry": "decoder_crashed=3:0.3:1",
        }
        if role == "faulty":
            options["module"] = "drill.device"
        if role == "far":
            options["url"] = self.proxy.url
        self.workers[role] = self.field.worker(ready=False, **options)
        return self.workers[role]

    def end(self, role: str, code: int, *allowed: int) -> None:
        """Note how a worker ended, and start another in its place."""
        if code not in allowed:
            self.wrong.append(f"{self.workers[role].name} ({role}) ended with {code}")
        self.start(role).wait_ready()

    def victim(self) -> str:
        """A worker that may be broken now.

        Not the one that takes the suspects: these have lost two workers, and with the third they are given up, as
        promised.
        """
        taker = str(self.field.client.get(QUARANTINE_OWNER))
        return self.field.chance.choice([role for role in ROLES if f"'{self.workers[role].name}." not in taker])


def together(field: Field) -> Outcome:
    """Workers, loaders, Redis and the way to it broken; poison, moody sources, a faulty device, copies: at random."""
    stage = _Stage(field, field.enter(FaultProxy(field.url)), field.enter(PictureServer()))
    for role in ROLES:
        stage.start(role)
    for worker in stage.workers.values():
        worker.wait_ready()
    bad = [mark(field, kind) for kind in KINDS]
    body = pictures.jpeg(pictures.picture())
    pause, bag = threading.Event(), list[str]()
    until_s = time.monotonic() + field.lasts_s
    while time.monotonic() < until_s:
        for _ in range(field.jobs // 100):
            begin = len(field.sent)
            field.enqueue(99 - MOODY)
            urls = [stage.source.serve(f"/{begin + number}.jpg", *moody(field, body)) for number in range(MOODY)]
            for url in urls:
                field.enqueue(1, [url])
            stage.guilty.update(field.enqueue(1, [field.chance.choice(bad)]))
        pause.wait(field.chance.uniform(0.3, 2.0))
        bag = bag or field.chance.sample(BREAKS, len(BREAKS))
        kind = bag.pop()
        stage.seen[kind] += 1
        _break(stage, kind)
        for role, worker in list(stage.workers.items()):
            if (code := worker.exit_code) is not None:
                stage.end(role, code, *((DEVICE_LOST,) if role == "faulty" else ()))
        # The backlog stays what the fleet can work off in the end.
        while len(field.sent) - (field.answered() - field.answered_before) > 20 * field.jobs:
            pause.wait(0.2)
    return _finish(stage)


def _finish(stage: _Stage) -> Outcome:
    stage.proxy.heal()
    # Nobody else will: in the end the faulty one may have lost its device.
    if stage.workers["plain"].exit_code is not None:
        stage.end("plain", stage.workers["plain"].exit_code or 0)
    seen = ", ".join(f"{kind} {count}" for kind, count in sorted(stage.seen.items()))
    notes = f"{seen}; {stage.proxy.cuts} cuts, {len(stage.guilty)} poisonous, {stage.field.lasts_s / 60:g} minutes"
    outcome = stage.field.finish(
        "together", promised_s=PROMISED_S, timeout_s=600, notes=notes, wrong=stage.wrong, only=()
    )
    return wrong(outcome, *misjudged(outcome, stage.guilty))


def _break(stage: _Stage, kind: str) -> None:
    field, chance, role = stage.field, stage.field.chance, stage.victim()
    victim = stage.workers[role]
    if kind == "duplicates":
        # Of innocents: a copy has a picture of its own, and who of the two is met first is not the drill's to say.
        innocent = [job_id for job_id in field.sent if job_id not in stage.guilty]
        field.enqueue(100, ids=chance.sample(innocent, min(100, len(innocent))))
    elif kind == "loader":
        for pid in loaders_of(victim.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
    elif kind == "redis":
        if field.server is not None:
            field.server.kill()
            field.server.restart()
    elif kind == "cut":
        (stage.proxy.cut_request_after if chance.random() < 0.5 else stage.proxy.cut_reply_after)(
            chance.randrange(3000)
        )
    elif kind == "hang":
        victim.signal(signal.SIGSTOP)
        try:
            field.time_until(lambda: not field.held(victim), timeout_s=PROMISED_S + 10)
        finally:
            victim.signal(signal.SIGCONT)
    else:
        _end(stage, role, kind)


def _end(stage: _Stage, role: str, kind: str) -> None:
    """SIGKILL, SIGTERM, or SIGTERM twice; then another worker takes the place."""
    field, victim = stage.field, stage.workers[role]
    if kind == "kill":
        victim.kill()
    else:
        victim.terminate()
        if kind == "twice":
            wait_until(lambda: not victim.ready_file.exists() or not victim.is_running, timeout_s=30)
            victim.terminate()
        victim.wait(timeout_s=60)
    field.time_until(lambda: not field.held(victim), timeout_s=PROMISED_S + 10)
    allowed = (-signal.SIGKILL,) if kind == "kill" else (0, DEVICE_LOST) if role == "faulty" else (0,)
    stage.end(role, victim.wait(timeout_s=1), *allowed)
