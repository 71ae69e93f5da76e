"""`python -m drill.peers --kind celery|batches`: the drill `kill`, for plain Celery and for celery-batches.

Same fault as in `drill.workers.kill`: two workers get M jobs together, and after a random number of effects the
process group of one worker gets SIGKILL. The other worker takes over; every round a new worker joins, and the
survivor is killed next. A random pause of up to 0.1 s precedes the kill: without it the kill would always come between
a batch's effects and its acknowledgements.

The peers get the settings of their documentation for work that must not be lost, and two more that only help them:
acks_late, reject_on_worker_lost, no result backend, visibility_timeout of 10 s (its default of an hour would be the
recovery time), and a search for abandoned messages every second (default: every 100 s). celery-batches gets a
prefetch of one full batch for each process, without which it makes no full batches.

Counted by id:

- lost: jobs without any effect at the end, though workers were ready and idle for visibility_timeout + 15 s.
- twice: jobs whose effect was executed more than once.
- rerun: jobs that were executed from a redelivered message, whether or not the first delivery had its effect.
- recovery: from the SIGKILL until every job of the round that is not lost has its first effect, to 20 ms. This includes
  the survivor's time for the jobs that were still in the queue. A lost job counts only as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

import redis
from celery import Celery
from tests.support.processes import Process, clean_environment
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from drill.peer_app import (
    CONCURRENCY,
    EFFECTS,
    FLUSH_EVERY,
    FLUSH_INTERVAL_S,
    QUEUE,
    REDELIVERED,
    SWEEP_S,
    TASK,
    VISIBILITY_S,
)

Kind = Literal["celery", "batches"]
APPS: Final[dict[Kind, str]] = {"celery": "drill.peer_app:plain", "batches": "drill.peer_app:batches"}
PACKAGES: Final[dict[Kind, tuple[str, ...]]] = {
    "celery": ("celery", "kombu"),
    "batches": ("celery-batches", "celery", "kombu"),
}
NO_PROGRESS_S: Final = VISIBILITY_S + 15.0
"""After so long without progress, missing jobs count as lost."""
POLL_S: Final = 0.02
MAX_PAUSE_S: Final = 0.1
COMMON_TEXT: Final = (
    f"acks_late, reject_on_worker_lost, prefork with {CONCURRENCY} processes, visibility_timeout {VISIBILITY_S} s "
    f"(default: 3600 s), abandoned messages are looked for every {SWEEP_S} s (default: 100 s)"
)
SETTINGS_TEXT: Final[dict[Kind, str]] = {
    "celery": f"{COMMON_TEXT}, prefetch_multiplier 1",
    "batches": f"{COMMON_TEXT}, flush_every {FLUSH_EVERY}, flush_interval {FLUSH_INTERVAL_S} s, "
    f"prefetch_multiplier {FLUSH_EVERY}",
}


@dataclass(frozen=True)
class PeerFigures:
    """Figures of a peer's drill; the module's docstring defines each number. Times in seconds."""

    kind: Kind
    version: str
    enqueued: int
    answered: int
    lost: int
    twice: int
    rerun: int
    recovery_max_s: float
    recovery_median_s: float
    seed: int


class PeerWorker(Process):
    """A real Celery worker in its own session."""

    def __init__(self, kind: Kind, *, redis_url: str, folder: Path, name: str) -> None:
        self._ready_file = folder / f"{name}.ready"
        command = [sys.executable, "-m", "celery", "-A", APPS[kind], "worker", "--loglevel=WARNING", "--pool=prefork"]
        command += [f"--concurrency={CONCURRENCY}", f"--hostname={name}@%h", "-Q", QUEUE]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        env = clean_environment({"DRILL_REDIS_URL": redis_url, "DRILL_READY_FILE": str(self._ready_file)})
        super().__init__(command, name=name, folder=folder, env=env)

    def wait_ready(self, *, timeout_s: float = 60.0) -> Self:
        """Wait until it consumes.

        Raises:
            ServerError: it ended or is not ready in time.
        """
        what = f"expected to be ready within {timeout_s} s"
        try:
            wait_until(lambda: self._ready_file.exists() or not self.is_running, timeout_s=timeout_s, every_s=0.05)
        except TimeoutError:
            raise self.error(what) from None
        if not self.is_running:
            raise self.error(what)
        return self

    def kill_group(self) -> None:
        """Send SIGKILL to the worker's process group, and wait until the worker has ended."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait(timeout_s=10)

    def __exit__(self, *_: object) -> None:
        self.stop(timeout_s=5)


@dataclass
class PeerDrill:
    """One peer's Redis, its workers, and the effects read so far."""

    kind: Kind
    jobs: int
    chance: random.Random
    url: str
    client: redis.Redis
    folder: Path
    stack: ExitStack
    report: Callable[[str], None]
    executed: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    workers: int = 0

    def worker(self) -> PeerWorker:
        """Start a worker that ends with the drill, and wait until it consumes."""
        self.workers += 1
        worker = PeerWorker(self.kind, redis_url=self.url, folder=self.folder, name=f"peer{self.workers}")
        return self.stack.enter_context(worker).wait_ready()

    def enqueue(self, ids: Sequence[str]) -> None:
        """Let Celery write the messages to another database, then send them all in one command."""
        staging_url = self.url.removesuffix("/0") + "/1"
        app = Celery("producer", broker=staging_url)
        app.conf.update(task_default_queue=QUEUE)
        with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
            for job_id in ids:
                app.send_task(TASK, args=[job_id], task_id=job_id, queue=QUEUE, producer=producer)
        app.close()
        with redis.Redis.from_url(staging_url, socket_timeout=10.0) as client:
            messages: Any = client.lrange(QUEUE, 0, -1)
            client.flushdb()
        if len(messages) != len(ids):
            raise RuntimeError(f"expected {len(ids)} messages, Celery wrote {len(messages)}")
        self.client.lpush(QUEUE, *reversed(messages))
        self.sent += ids

    def read_effects(self) -> None:
        """Read the effects since the last call."""
        more: Any = self.client.lrange(EFFECTS, self.executed.total(), -1)
        self.executed.update(job_id.decode() for job_id in more)

    def round(self, number: int, killed: PeerWorker) -> PeerWorker:
        """Kill one worker during its jobs; return the survivor."""
        survivor = self.worker()
        ids = [f"{number}-{count}" for count in range(self.jobs)]
        enough = int(self.client.llen(EFFECTS)) + self.chance.randrange(1, max(2, self.jobs // 2))
        self.enqueue(ids)
        wait_until(
            lambda: int(self.client.llen(EFFECTS)) >= enough, timeout_s=60, every_s=0.002, what=f"{enough} effects"
        )
        time.sleep(self.chance.uniform(0, MAX_PAUSE_S))  # so that the kill comes at a random moment
        killed.kill_group()
        killed_s = time.monotonic()
        unacked, queued = int(self.client.hlen("unacked")), int(self.client.llen(QUEUE))
        recovery_s = self._recover(set(ids), killed_s)
        self.recoveries.append(recovery_s)
        self._settle()
        missing = [job_id for job_id in ids if not self.executed[job_id]]
        twice = sum(self.executed[job_id] > 1 for job_id in ids)
        text = f"round {number}: killed with {queued} queued, {unacked} unacked by both; recovery {recovery_s:.2f} s"
        text += f", lost {len(missing)}, twice {twice}"
        if left := self._left():
            text += f", {left} messages still in Redis"
        self.report(text + (f"; lost: {', '.join(missing[:5])}" if missing else ""))
        return survivor

    def _recover(self, ids: set[str], killed_s: float) -> float:
        """Wait until all ids have an effect or progress stops; return the seconds from kill to last new effect."""
        last_s, missing = killed_s, len(ids)

        def is_over() -> bool:
            nonlocal last_s, missing
            self.read_effects()
            now_missing = len(ids - self.executed.keys())
            if now_missing < missing:
                last_s, missing = time.monotonic(), now_missing
            return missing == 0 or time.monotonic() - last_s > NO_PROGRESS_S

        wait_until(
            is_over, timeout_s=120 + 4 * NO_PROGRESS_S + self.jobs * 0.05, every_s=POLL_S, what="the round's end"
        )
        return last_s - killed_s

    def _left(self) -> int:
        return int(self.client.llen(QUEUE)) + int(self.client.hlen("unacked"))

    def _settle(self) -> None:
        """Wait for redelivery of jobs that had an effect but no acknowledgement: they belong to this round."""
        try:
            wait_until(lambda: not self._left(), timeout_s=NO_PROGRESS_S, every_s=0.05)
        except TimeoutError:
            self.report(f"{self._left()} messages are not acknowledged after {NO_PROGRESS_S:g} s more")
        self.read_effects()

    def figures(self, seed: int) -> PeerFigures:
        """Return the figures of all rounds."""
        self.read_effects()
        answered = sum(self.executed[job_id] > 0 for job_id in self.sent)
        return PeerFigures(
            kind=self.kind,
            version=", ".join(f"{name} {version(name)}" for name in PACKAGES[self.kind]),
            enqueued=len(self.sent),
            answered=answered,
            lost=len(self.sent) - answered,
            twice=sum(self.executed[job_id] > 1 for job_id in self.sent),
            rerun=int(self.client.scard(REDELIVERED)),
            recovery_max_s=round(max(self.recoveries), 2),
            recovery_median_s=round(statistics.median(self.recoveries), 2),
            seed=seed,
        )


def run(
    kind: Kind, rounds: int, jobs: int, seed: int, *, report: Callable[[str], None] = lambda _: None
) -> PeerFigures:
    """Run the drill on its own Valkey; `report` gets a line for each round.

    Raises:
        TimeoutError: a round does not end.
        ServerError: a worker does not start.
    """
    with tempfile.TemporaryDirectory(prefix="shiwu-peers-") as name, ExitStack() as stack:
        server = stack.enter_context(Valkey(folder=Path(name) / "valkey", config={"appendonly": "yes"}))
        drill = PeerDrill(
            kind=kind,
            jobs=jobs,
            chance=random.Random(f"{seed}-{kind}"),
            url=server.url,
            client=stack.enter_context(server.client()),
            folder=Path(name),
            stack=stack,
            report=report,
        )
        killed = drill.worker()
        for number in range(1, rounds + 1):
            killed = drill.round(number, killed)
        return drill.figures(seed)


def main() -> None:
    """Run one peer's drill and print its figures."""
    parser = argparse.ArgumentParser(prog="drill.peers", description="the kill drill for shiwu's peers")
    parser.add_argument("--kind", choices=get_args(Kind), required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1000, help="enqueued in each round")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", action="store_true", help="print one JSON line; the rounds go to stderr")
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.jobs < 2:
        parser.error("expected at least 1 round and 2 jobs")
    out = sys.stderr if asked.json else sys.stdout
    print(f"{asked.kind}, seed {asked.seed}: {SETTINGS_TEXT[asked.kind]}", file=out, flush=True)
    found = run(asked.kind, asked.rounds, asked.jobs, asked.seed, report=lambda text: print(text, file=out, flush=True))
    if asked.json:
        print(json.dumps(asdict(found) | {"visibility_timeout_s": VISIBILITY_S, "settings": SETTINGS_TEXT[asked.kind]}))
    else:
        print(", ".join(f"{name} {value}" for name, value in asdict(found).items()))


if __name__ == "__main__":
    main()
