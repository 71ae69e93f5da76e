"""One run of a drill: its Redis, images and workers, and the count of answers at its end."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import redis
from tests.support import pictures
from tests.support.processes import WorkerProcess
from tests.support.waiting import wait_until

from shiwu.broker.chunks import chunks
from shiwu.broker.message_writer import build_message
from shiwu.broker.server_clock import server_time_ms
from shiwu.broker.sharding import PoolOptions, by_shard, open_shards
from shiwu.contract import CLAIMS, COUNTERS, LEASES, RESULT_STREAM, Answer, Lane, Request, Status, result_key

LEASE_S: Final = 3.0
TAKEOVER_S: Final = 2.0
"""Promised: the jobs of a crashed worker are claimed again this long after their lease expired."""
TIMEOUT_S: Final = 30.0
"""How long a drill waits for a recovery, which it then reports as late."""
CHUNK_SIZE: Final = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a drill. Times are in seconds."""

    name: str
    enqueued: int
    answered: int
    twice: int
    lost: int
    late: int
    """Faults from which the recovery took longer than promised."""
    rerun: int
    """Answers that took more than one attempt."""
    discarded: int
    """Second answers, which were discarded."""
    statuses: dict[str, int]
    breaks: int
    recovery_max_s: float = 0.0
    promised_s: float = 0.0
    notes: str = ""
    untagged: dict[str, str] = field(default_factory=dict)
    """Id → reason, for jobs without tags."""
    wrong: tuple[str, ...] = ()
    """Other broken promises, as texts."""

    @property
    def is_kept(self) -> bool:
        """Whether the promise held."""
        return not (self.twice or self.lost or self.late or self.wrong) and self.enqueued == self.answered > 0


@dataclass
class DrillRun:
    """The Redis, images and workers of one drill.

    `jobs` and `rounds` set its length; a short form is the same drill with small numbers.
    """

    url: str
    folder: Path
    rng: random.Random
    jobs: int
    rounds: int
    stack: ExitStack
    server: Any = None
    """The drill's own server, for drills that break Redis; otherwise None."""
    prefix: str = "d"
    lasts_s: float = 0.0
    """Length in seconds of drills that have one, or of each outage."""
    sent: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    workers: int = 0
    """How many workers were started."""
    breaks: int = 0
    """Faults whose recovery cannot be timed."""

    def __post_init__(self) -> None:
        self.clients = open_shards(self.url, PoolOptions(timeout_s=10.0, retries=5))
        """One for each shard; one alone without a cluster."""
        for client in self.clients:
            self.stack.enter_context(client)
        self.client: redis.Redis = self.clients[0]
        self.images = [self.write_image(sample.label) for sample in pictures.samples()[:12]]
        self._known = set(self.sent)
        self.answered_before = self.answered()
        self.counters_before = self._counters()

    def write_image(self, label: str) -> str:
        """Write a real image into a folder that workers may read; return its reference."""
        sample = pictures.sample(label)
        path = self.folder / f"{sample.path.stem}.jpg"
        if not path.exists():
            path.write_bytes(pictures.jpeg(pictures.picture(label)))
        return path.as_uri()

    def start_worker(self, *, url: str | None = None, ready: bool = True, **options: Any) -> WorkerProcess:
        """Start a real worker process with a short lease; it ends with the drill."""
        self.workers += 1
        settings: dict[str, Any] = {
            "allow_folders": self.folder,
            "lease_s": LEASE_S,
            "retry_first_s": 0.3,
            "stream_length": 10_000_000,
            "log_level": "warning",
            "max_batch": 16,
            "torch_threads": 1,
            "redis_timeout_s": 2,
        }
        name = f"{self.prefix}{self.workers}"
        process = WorkerProcess(redis_url=url or self.url, folder=self.folder, name=name, **(settings | options))
        self.enter(process)
        return process.wait_ready() if ready else process

    def start_workers(self, count: int, **options: Any) -> list[WorkerProcess]:
        """Start several workers at the same time."""
        workers = [self.start_worker(ready=False, **options) for _ in range(count)]
        return [worker.wait_ready() for worker in workers]

    def enter(self, part: AbstractContextManager[Any]) -> Any:
        """Start something that ends with the drill."""
        return self.stack.enter_context(part)

    def enqueue(self, count: int, images: Sequence[str] = (), *, ids: Sequence[str] = ()) -> list[str]:
        """Send jobs to both lanes; return their ids."""
        begin = len(self.sent)
        ids = list(ids) or [f"{self.prefix}-{number}" for number in range(begin, begin + count)]
        for portion in chunks(ids, CHUNK_SIZE):
            with self.client.pipeline(transaction=False) as pipe:
                sent_ms = server_time_ms(self.client)
                for job_id in portion:
                    lane = self.rng.choice(list(Lane))
                    request = Request(image=self.rng.choice(list(images) or self.images))
                    pipe.lpush(lane.queue, build_message(request, job_id=job_id, lane=lane, sent_ms=sent_ms))
                pipe.execute()
        self.note(ids)
        return list(ids)

    def note(self, ids: Sequence[str]) -> None:
        """Expect one answer for each of these jobs."""
        self.sent += [job_id for job_id in dict.fromkeys(ids) if job_id not in self._known]
        self._known.update(ids)

    def answered(self) -> int:
        """The total of answers that Redis has counted."""
        return sum(int(client.hget(COUNTERS, "answered") or 0) for client in self.clients)

    def wait_answers(self, more: int, *, timeout_s: float = 120.0) -> None:
        """Wait until so many answers have come since the drill began."""
        enough = self.answered_before + more
        wait_until(lambda: self.answered() >= enough, timeout_s=timeout_s, every_s=0.01, what=f"{more} answers")

    def held(self, worker: WorkerProcess) -> set[str]:
        """Jobs that this worker holds according to Redis."""
        records: Any = self.client.hgetall(CLAIMS)
        return {job_id.decode() for job_id, record in records.items() if record.startswith(f"{worker.name}.".encode())}

    def time_takeover(self, worker: WorkerProcess) -> float:
        """Seconds until all jobs of this worker are claimed by others or answered; recorded as a recovery."""
        left = self.held(worker)

        def is_taken_over() -> bool:
            with self.client.pipeline(transaction=False) as pipe:
                for job_id in left:
                    pipe.hget(CLAIMS, job_id)
                    pipe.exists(result_key(job_id))
                found = pipe.execute()
            own = f"{worker.name}.".encode()
            for job_id, record, is_answered in zip(tuple(left), found[::2], found[1::2], strict=True):
                if is_answered or (record and not record.startswith(own)):
                    left.discard(job_id)
            return not left

        return self.time_until(is_taken_over, timeout_s=TIMEOUT_S)

    def time_until(self, condition: Callable[[], Any], *, timeout_s: float) -> float:
        """Seconds until the condition is true; recorded as a recovery."""
        began_s = time.monotonic()
        wait_until(condition, timeout_s=timeout_s, every_s=0.02)
        self.recoveries.append(time.monotonic() - began_s)
        return self.recoveries[-1]

    def finish(
        self,
        name: str,
        *,
        promised_s: float,
        timeout_s: float = 180.0,
        notes: str = "",
        wrong: Sequence[str] = (),
        only: Sequence[Status] = (Status.TAGGED,),
    ) -> Outcome:
        """Wait for the last answer, and count all answers.

        Args:
            only: the statuses that answers may have; none: any.
        """
        found = list(wrong)
        try:
            wait_until(lambda: not self._missing(), timeout_s=timeout_s, every_s=0.25)
        except TimeoutError:
            found.append(f"{self._missing()} answers did not come within {timeout_s:g} s")
        try:
            wait_until(lambda: not any(self._count_held()), timeout_s=LEASE_S + 10)
        except TimeoutError:
            found.append("{} claims and {} leases are left".format(*self._count_held()))
        outcome = self._count(name, promised_s=promised_s, notes=notes, wrong=tuple(found))
        others = {status: count for status, count in outcome.statuses.items() if status not in only}
        if only and others:
            text = f"expected only {', '.join(only)}, got {others}, first {list(outcome.untagged.items())[:3]}"
            outcome = replace(outcome, wrong=(*outcome.wrong, text))
        return outcome

    def _count_held(self) -> tuple[int, int]:
        """How many claims and leases there are."""
        held = sum(int(client.hlen(CLAIMS)) for client in self.clients)
        return held, sum(int(client.zcard(LEASES)) for client in self.clients)

    def _missing(self) -> int:
        """How many jobs have no answer yet."""
        found = 0
        for shard, ids in by_shard(self.sent, shards=len(self.clients), id_of=str).items():
            for portion in chunks(ids, CHUNK_SIZE):
                found += int(self.clients[shard].exists(*map(result_key, portion)))
        return len(self.sent) - found

    def _count(self, name: str, *, promised_s: float, notes: str, wrong: tuple[str, ...]) -> Outcome:
        sent, entries, statuses, rerun = self._known, Counter[str](), Counter[str](), 0
        untagged: dict[str, str] = {}
        for _, fields in chain.from_iterable(map(stream_entries, self.clients)):
            if (job_id := fields[b"id"].decode()) in sent:
                answer = Answer.from_json(fields[b"answer"])
                entries[job_id] += 1
                statuses[str(answer.status)] += 1
                rerun += answer.attempts > 1
                if answer.status is not Status.TAGGED:
                    untagged[job_id] = f"{answer.error.code}: {answer.error.message}" if answer.error else "?"
        counters = self._counters()
        before = self.counters_before
        return Outcome(
            name=name,
            enqueued=len(sent),
            answered=len(entries),
            twice=sum(count > 1 for count in entries.values()),
            lost=len(sent - entries.keys()),
            late=sum(seconds > promised_s for seconds in self.recoveries),
            rerun=rerun,
            discarded=counters["answers_discarded"] - before["answers_discarded"],
            statuses=dict(statuses),
            breaks=self.breaks + len(self.recoveries),
            recovery_max_s=round(max(self.recoveries, default=0.0), 2),
            promised_s=promised_s,
            notes=notes,
            untagged=untagged,
            wrong=wrong,
        )

    def _counters(self) -> Counter[str]:
        total = Counter[str]()
        for client in self.clients:
            found: Any = client.hgetall(COUNTERS)
            total.update({name.decode(): int(value) for name, value in found.items()})
        return total


def stream_entries(client: redis.Redis) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """Id and fields of each entry of the results stream of a server or shard."""
    last = "-"
    while portion := client.xrange(RESULT_STREAM, min=last, count=CHUNK_SIZE):
        entries: Any = portion
        yield from entries
        last = f"({entries[-1][0].decode()}"


def wrong(outcome: Outcome, *what: str) -> Outcome:
    """The outcome with further broken promises."""
    return replace(outcome, wrong=(*outcome.wrong, *what))
