"""In random histories of workers that crash, no id is lost and each is answered once."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shiwu.broker.answers import AnswerEntry
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
    done_key,
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


class Fleet(RuleBasedStateMachine):
    """Two workers, one of which has leases that expire immediately, on one real server."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.workers = {
            "steady": make_lease_queue(self.client, "steady"),
            "crashing": make_lease_queue(self.client, "crashing", lease_s=0.0),
        }
        self.committers = {name: make_answer_store(self.client, name) for name in self.workers}
        self.in_flight: dict[str, list[Claimed]] = {name: [] for name in self.workers}
        self.sent: set[str] = set()
        self.requeued: list[str] = []
        self.letters = DeadLetters(self.client)

    @rule(number=st.integers(0, 30), where=st.sampled_from(LANES))
    def enqueue(self, number: int, where: tuple[Lane, str]) -> None:
        """Send a job, perhaps one that was sent or answered before."""
        lane, key = where
        self.client.lpush(key, message(f"job-{number}", lane, answer_by_ms=1.0 if number % 5 == 0 else None))
        self.sent.add(f"job-{number}")

    @rule(worker=st.sampled_from(["steady", "crashing"]), limit=st.integers(1, 8))
    def claim(self, worker: str, limit: int) -> None:
        """Take some jobs."""
        jobs = self.workers[worker].claim(limit, held=[job.id for job in self.in_flight[worker]]).jobs
        assert len(jobs) <= limit
        self.in_flight[worker] += jobs

    @rule(worker=st.sampled_from(["steady", "crashing"]), share=st.floats(0, 1))
    def commit(self, worker: str, share: float) -> None:
        """Answer some of what this worker believes to hold."""
        count = int(len(self.in_flight[worker]) * share)
        done, self.in_flight[worker] = self.in_flight[worker][:count], self.in_flight[worker][count:]
        self.committers[worker].write([answer(job) for job in done])

    @rule(worker=st.sampled_from(["steady", "crashing"]))
    def fail(self, worker: str) -> None:
        """End one job as a dead letter."""
        if self.in_flight[worker]:
            job = self.in_flight[worker].pop()
            failed = Answer(id=job.id, status=Status.FAILED, attempts=job.attempt)
            message = job.key.encode() + b"|" + job.raw
            entry = AnswerEntry(answer=failed, id=job.id, generation=job.generation, message=message, is_dead=True)
            self.committers[worker].write([entry])

    @rule(number=st.integers(0, 30))
    def requeue(self, number: int) -> None:
        """Requeue a dead letter: one more answer is expected."""
        self.requeued += self.letters.requeue([f"job-{number}"])

    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        """A producer cancels a job, wherever it is."""
        job_id = f"job-{number}"
        if job_id in self.sent:
            cancelled = Answer(id=job_id, status=Status.CANCELLED, attempts=0)
            self.committers["steady"].write(
                [AnswerEntry(answer=cancelled, id=job_id, is_from_outside=True)], token="producer"
            )

    @rule(number=st.integers(0, 30))
    def pass_deadline(self, number: int) -> None:
        """Note the deadline of a job; the next maintenance answers it if its message has one."""
        if f"job-{number}" in self.sent:
            self.client.zadd(DEADLINES, {f"job-{number}": 1.0})

    @rule(worker=st.sampled_from(["steady", "crashing"]), delay_s=st.sampled_from([0.0, 0.001]), counts=st.booleans())
    def release(self, worker: str, delay_s: float, counts: bool) -> None:
        """Give everything back."""
        self.workers[worker].release(
            [Release(job.id, delay_s=delay_s, counts=counts) for job in self.in_flight[worker]]
        )
        self.in_flight[worker] = []

    @rule()
    def renew(self) -> None:
        """Renew the claims of the steady worker; the reply names those that it lost."""
        lost = self.workers["steady"].renew([job.id for job in self.in_flight["steady"]])
        assert set(lost) <= {job.id for job in self.in_flight["steady"]}

    @rule()
    def run_maintenance(self) -> None:
        """Requeue what the crashing worker held and what was delayed."""
        make_maintenance(self.client).run_once()

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every id is in a lane, claimed under a lease, delayed, or answered."""
        raws = [raw for _, key in LANES for raw in self.client.lrange(key, 0, -1)]
        raws += [entry.partition(b"|")[2] for entry in self.client.lrange(QUARANTINE, 0, -1)]
        in_lanes = {json.loads(raw)["headers"]["id"] for raw in raws}
        claimed = {key.decode() for key in self.client.hkeys(CLAIMS)}
        leased = {key.decode() for key in self.client.zrange(LEASES, 0, -1)}
        stored = {key.decode() for key in self.client.hkeys(DELAYED_MESSAGES)}
        delayed = {key.decode() for key in self.client.zrange(DELAYED, 0, -1)}
        assert claimed == leased
        assert stored == delayed
        answered = {job_id for job_id in self.sent if self.client.exists(done_key(job_id))}
        assert self.sent == in_lanes | claimed | stored | answered

    def teardown(self) -> None:
        """A last worker answers what is left; then each id that was sent has exactly one answer."""
        last = make_lease_queue(self.client, "last")
        for name in self.workers:
            self.workers[name].release([Release(job.id) for job in self.in_flight[name]])
        for _ in range(200):
            result = make_maintenance(self.client).run_once()
            self.client.delete(QUARANTINE_OWNER)  # as when its lease expires
            jobs = last.claim(50).jobs
            make_answer_store(self.client, "last").write([answer(job) for job in jobs])
            if not jobs and not result.waiting and not self.client.zcard(LEASES) and not self.client.zcard(DELAYED):
                break
        answered = [fields[b"id"].decode() for _, fields in self.client.xrange(RESULT_STREAM)]
        assert sorted(answered) == sorted([*self.sent, *self.requeued])


@pytest.mark.slow
def test_random_histories_answer_every_id_once(redis_url: str) -> None:
    """Random histories of two workers neither lose a job nor answer one twice."""
    with redis.Redis.from_url(redis_url) as client:
        Fleet.client = client
        run_state_machine_as_test(Fleet, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))
