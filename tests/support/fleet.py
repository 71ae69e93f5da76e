"""State machine: random histories of workers that crash, on one server or on the shards of a real cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shiwu import Client
from shiwu.broker.answers import AnswerEntry
from shiwu.broker.marks import ask_for_marks, found_marks
from shiwu.broker.sharding import ShardRedis, shard_of
from shiwu.contract import (
    CLAIMS,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    LEASES,
    QUARANTINE,
    QUARANTINE_OWNER,
    RESULT_STREAM,
    Answer,
    Lane,
    Status,
)
from shiwu_worker.jobs.job import Claimed, Release
from tests.support.redis_parts import (
    LANES,
    DeadLetters,
    answer,
    make_answer_store,
    make_lease_queue,
    make_maintenance,
    message,
)
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

WORKERS = st.sampled_from(["steady", "crashing"])
IMAGE = "s3://pictures/cat.jpg"
NUMBERS = st.integers(0, 30)
SHARD_NUMBERS = st.integers(0, 2)
"""Which shard a worker asks, modulo the number of shards."""


class WorkerOnShard:
    """What one worker does in one shard, and the jobs that it believes to hold there."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self.queue = make_lease_queue(client, name, lease_s=0.0 if name == "crashing" else 60.0)
        self.answers = make_answer_store(client, name)
        self.held: list[Claimed] = []


class Fleet(RuleBasedStateMachine):
    """Two workers, one of which has leases that expire immediately, on one real server."""

    clients: Sequence[redis.Redis]

    def __init__(self) -> None:
        super().__init__()
        self.flush()
        self.workers = {name: [WorkerOnShard(each, name) for each in self.clients] for name in ("steady", "crashing")}
        self.sent: set[str] = set()
        self.requeued: list[str] = []

    def flush(self) -> None:
        """Delete all data."""
        for client in self.clients:
            client.flushall()

    @contextmanager
    def reaching(self, shard: int) -> Iterator[None]:
        """A use of a shard."""
        yield

    def shard_of(self, job_id: str) -> int:
        """The shard of an id."""
        return shard_of(job_id, shards=len(self.clients))

    def worker(self, name: str, at: int) -> tuple[int, WorkerOnShard]:
        """A shard, and a worker in it."""
        shard = at % len(self.clients)
        return shard, self.workers[name][shard]

    @rule(number=NUMBERS, where=st.sampled_from(LANES))
    def enqueue(self, number: int, where: tuple[Lane, str]) -> None:
        """Send a job, perhaps one that was sent or answered before."""
        lane, key = where
        job_id = f"job-{number}"
        shard = self.shard_of(job_id)
        with self.reaching(shard):
            sent = message(job_id, lane, answer_by_ms=1.0 if number % 5 == 0 else None)
            self.clients[shard].lpush(key, sent)
            self.sent.add(job_id)

    @rule(worker=WORKERS, limit=st.integers(1, 8), at=SHARD_NUMBERS)
    def claim(self, worker: str, limit: int, at: int) -> None:
        """Take some jobs."""
        shard, part = self.worker(worker, at)
        with self.reaching(shard):
            jobs = part.queue.claim(limit, held=[job.id for job in part.held]).jobs
            assert len(jobs) <= limit
            part.held += jobs

    @rule(worker=WORKERS, share=st.floats(0, 1), at=SHARD_NUMBERS)
    def commit(self, worker: str, share: float, at: int) -> None:
        """Answer some of what this worker believes to hold."""
        shard, part = self.worker(worker, at)
        count = int(len(part.held) * share)
        with self.reaching(shard):
            part.answers.write([answer(job) for job in part.held[:count]])
            part.held = part.held[count:]

    @rule(worker=WORKERS, at=SHARD_NUMBERS)
    def fail(self, worker: str, at: int) -> None:
        """End one job as a dead letter."""
        shard, part = self.worker(worker, at)
        if part.held:
            job = part.held[-1]
            failed = Answer(id=job.id, status=Status.FAILED, attempts=job.attempt)
            text = job.key.encode() + b"|" + job.raw
            entry = AnswerEntry(answer=failed, id=job.id, generation=job.generation, message=text, is_dead=True)
            with self.reaching(shard):
                part.answers.write([entry])
                part.held.pop()

    @rule(number=NUMBERS)
    def requeue(self, number: int) -> None:
        """Requeue a dead letter: one more answer is expected."""
        with self.reaching(self.shard_of(f"job-{number}")):
            self.requeued += self.requeue_job(f"job-{number}")

    def requeue_job(self, job_id: str) -> list[str]:
        """Requeue it if it is a dead letter."""
        return DeadLetters(self.clients[0]).requeue([job_id])

    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        """A producer cancels a job, wherever it is."""
        job_id = f"job-{number}"
        if job_id in self.sent:
            with self.reaching(self.shard_of(job_id)):
                self.cancel_job(job_id)

    def cancel_job(self, job_id: str) -> None:
        """Answer it unless it is answered."""
        cancelled = Answer(id=job_id, status=Status.CANCELLED, attempts=0)
        entry = AnswerEntry(answer=cancelled, id=job_id, is_from_outside=True)
        self.workers["steady"][0].answers.write([entry], token="producer")

    @rule(number=NUMBERS)
    def pass_deadline(self, number: int) -> None:
        """Note the deadline of a job; the next maintenance answers it if its message has one."""
        job_id = f"job-{number}"
        shard = self.shard_of(job_id)
        if job_id in self.sent:
            with self.reaching(shard):
                self.clients[shard].zadd(DEADLINES, {job_id: 1.0})

    @rule(worker=WORKERS, delay_s=st.sampled_from([0.0, 0.001]), counts=st.booleans(), at=SHARD_NUMBERS)
    def release(self, worker: str, delay_s: float, counts: bool, at: int) -> None:
        """Give everything back."""
        shard, part = self.worker(worker, at)
        with self.reaching(shard):
            part.queue.release([Release(job.id, delay_s=delay_s, counts=counts) for job in part.held])
            part.held = []

    @rule(at=SHARD_NUMBERS)
    def renew(self, at: int) -> None:
        """Renew the claims of the steady worker; the reply names those that it lost."""
        shard, part = self.worker("steady", at)
        with self.reaching(shard):
            lost = part.queue.renew([job.id for job in part.held])
            assert set(lost) <= {job.id for job in part.held}

    @rule(at=SHARD_NUMBERS)
    def run_maintenance(self, at: int) -> None:
        """Requeue what the crashing worker held and what was delayed."""
        shard = at % len(self.clients)
        with self.reaching(shard):
            make_maintenance(self.clients[shard]).run_once()

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every id is in its shard and in no other: in a lane, claimed under a lease, delayed, or answered."""
        for shard, client in enumerate(self.clients):
            with self.reaching(shard):
                sent = {job_id for job_id in self.sent if self.shard_of(job_id) == shard}
                assert known_ids(client, self.sent) == sent

    def teardown(self) -> None:
        """A last worker answers what is left; then each id that was sent has exactly one answer."""
        answered: list[str] = []
        for shard, client in enumerate(self.clients):
            for workers in self.workers.values():
                workers[shard].queue.release([Release(job.id) for job in workers[shard].held])
            found = answer_all(client)
            assert {self.shard_of(job_id) for job_id in found} <= {shard}
            answered += found
        assert sorted(answered) == sorted([*self.sent, *self.requeued])


class ShardFleet(Fleet):
    """The same on shards of a cluster, whose clients cancel and requeue by id. A node crashes at a random step.

    Its shards refuse everything until it starts again, some steps later, with the data that it had acknowledged.
    """

    cluster: ValkeyCluster
    client: Client
    clients: Sequence[ShardRedis]

    def __init__(self) -> None:
        self.away_port = 0
        self.steps = 0
        self.kill_at = self.start_at = -1
        super().__init__()

    def flush(self) -> None:
        """Delete all data of all shards."""
        self.cluster.flush()

    @initialize(jobs=st.integers(10, 30), kill_at=st.integers(5, 30), steps=st.integers(0, 10), shard=SHARD_NUMBERS)
    def begin(self, jobs: int, kill_at: int, steps: int, shard: int) -> None:
        """Some jobs; after how many steps the node of a shard is killed, and for how many steps it is away."""
        self.sent.update(self.client.enqueue_many({"image": IMAGE, "id": f"job-{number}"} for number in range(jobs)))
        self.kill_at, self.start_at, self.victim = kill_at, kill_at + steps, self.node_of(shard)

    def node_of(self, shard: int) -> int:
        """The port of the node that has a shard."""
        return self.cluster.owner(self.clients[shard].shard.slot or 0)

    @invariant()
    def crash_when_due(self) -> None:
        """Kill the chosen node, and start it again."""
        self.steps += 1
        if self.steps - 1 == self.kill_at:
            self.away_port = self.victim
            self.cluster.server(self.away_port).kill()
        if self.steps - 1 == self.start_at:
            self.start_again()

    def start_again(self) -> None:
        """Start the killed node, if it is away, and wait until its shards answer."""
        if self.away_port:
            self.cluster.server(self.away_port).start()
            wait_until(self._all_answer, timeout_s=60, every_s=0.02, what="all shards answer")
            self.away_port = 0

    def _all_answer(self) -> bool:
        try:
            return all(client.xlen(RESULT_STREAM) >= 0 for client in self.clients)
        except redis.ConnectionError:
            return False

    @contextmanager
    def reaching(self, shard: int) -> Iterator[None]:
        """A use of a shard, which ends with an error if its node is away."""
        try:
            yield
        except redis.ConnectionError:
            if not self.away_port or self.node_of(shard) != self.away_port:
                raise

    @rule(number=NUMBERS, lane=st.sampled_from(Lane))
    def enqueue_by_client(self, number: int, lane: Lane) -> None:
        """The client finds the shard."""
        job_id = f"job-{number}"
        with self.reaching(self.shard_of(job_id)):
            self.client.enqueue(IMAGE, id=job_id, lane=lane)
            self.sent.add(job_id)

    def requeue_job(self, job_id: str) -> list[str]:
        """Requeue it if it is a dead letter."""
        return self.client.requeue([job_id])

    def cancel_job(self, job_id: str) -> None:
        """Answer it unless it is answered."""
        self.client.cancel([job_id])

    def teardown(self) -> None:
        """Start the node again, and count the answers of all shards."""
        self.start_again()
        super().teardown()


def known_ids(client: redis.Redis, sent: set[str]) -> set[str]:
    """The ids that one server or shard has in any state."""
    asked = sorted(sent) or [""]  # commands for no field are refused
    with client.pipeline(transaction=False) as pipe:
        for _, key in LANES:
            pipe.lrange(key, 0, -1)
        pipe.lrange(QUARANTINE, 0, -1)
        pipe.hkeys(CLAIMS)
        pipe.zrange(LEASES, 0, -1)
        pipe.hkeys(DELAYED_MESSAGES)
        pipe.zrange(DELAYED, 0, -1)
        ask_for_marks(pipe, asked)
        replies = pipe.execute()
    *lanes, entries, claimed, leased, stored, delayed = replies[: len(LANES) + 5]
    raws = [*chain(*lanes), *(entry.partition(b"|")[2] for entry in entries)]
    in_lanes = {json.loads(raw)["headers"]["id"] for raw in raws}
    assert set(claimed) == set(leased)
    assert set(stored) == set(delayed)
    marks = found_marks(replies[len(LANES) + 5 :])
    answered = {job_id for job_id, mark in zip(asked, marks, strict=True) if mark is not None}
    return in_lanes | {job_id.decode() for job_id in (*claimed, *stored)} | answered


def answer_all(client: redis.Redis) -> list[str]:
    """Answer all jobs of one server or shard; the ids of all answers in its stream."""
    last = make_lease_queue(client, "last")
    for _ in range(200):
        result = make_maintenance(client).run_once()
        client.delete(QUARANTINE_OWNER)  # as when its lease expires
        jobs = last.claim(50).jobs
        make_answer_store(client, "last").write([answer(job) for job in jobs])
        if not jobs and not result.waiting and not client.zcard(LEASES) and not client.zcard(DELAYED):
            break
    entries: Any = client.xrange(RESULT_STREAM)
    return [fields[b"id"].decode() for _, fields in entries]
