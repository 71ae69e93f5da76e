"""A message that ends its worker's process is identified alone in quarantine; the other messages are answered."""

from __future__ import annotations

import pytest
import redis

from shiwu.contract import ATTEMPTS, CLAIMS, QUARANTINE, QUARANTINE_OWNER, Lane
from shiwu_worker.jobs.job import Release
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until

HARMLESS = [f"job-{n}" for n in range(5)]


def crash(client: redis.Redis, name: str) -> int:
    """Let a worker claim everything and crash, with leases that expire immediately; returns how many jobs it held."""
    jobs = make_lease_queue(client, name, lease_s=0.0).claim(100).jobs
    make_maintenance(client).run_once()
    return len(jobs)


def test_job_that_ends_workers_is_identified_alone(redis_client: redis.Redis) -> None:
    """Two deaths with six jobs each; then one job at a time: five are answered, one ends a third worker."""
    for job_id in [*HARMLESS[:3], "crashing", *HARMLESS[3:]]:
        redis_client.lpush(Lane.BULK.queue, message(job_id, Lane.BULK))
    assert [crash(redis_client, "first"), crash(redis_client, "second")] == [6, 6]
    assert redis_client.llen(QUARANTINE) == 6
    deaths, answered = 0, []
    for number in range(20):
        redis_client.delete(QUARANTINE_OWNER)  # the lease of an owner that crashed has expired
        queue = make_lease_queue(redis_client, f"w{number}", lease_s=0.0)
        claimed = queue.claim(100)
        if not claimed.jobs:
            break
        [job] = claimed.jobs
        if job.id == "crashing" and job.attempt <= 3:
            deaths += 1
            make_maintenance(redis_client).run_once()
        else:
            make_answer_store(redis_client, f"w{number}").write([answer(job)])
            answered.append((job.id, job.attempt))
    assert deaths == 1, "expected one more death, with this job alone"
    assert sorted(answered) == sorted([*[(job_id, 3) for job_id in HARMLESS], ("crashing", 4)])
    assert redis_client.exists(QUARANTINE, CLAIMS, ATTEMPTS) == 0


def test_job_on_a_lost_device_twice_is_quarantined(redis_client: redis.Redis) -> None:
    """A worker that loses its device releases the jobs on it as a death; after the second death they are isolated."""
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    for worker, lengths in (("first", (1, 0)), ("second", (0, 1))):
        queue = make_lease_queue(redis_client, worker)
        assert len(queue.claim(5).jobs) == 1
        assert queue.release([Release("job", counts=True)]) == 1
        assert (redis_client.llen(Lane.BULK.queue), redis_client.llen(QUARANTINE)) == lengths
    [job] = make_lease_queue(redis_client, "third").claim(5).jobs
    assert job.attempt == 3


def test_one_worker_owns_the_quarantine(redis_client: redis.Redis) -> None:
    """The owner claims nothing else while jobs are quarantined; other workers claim as usual."""
    redis_client.lpush(Lane.BULK.queue, message("quarantined", Lane.BULK))
    crash(redis_client, "first")
    crash(redis_client, "second")
    redis_client.lpush(Lane.BULK.queue, message("ordinary", Lane.BULK))
    redis_client.delete(QUARANTINE_OWNER)
    owner, other = make_lease_queue(redis_client, "owner"), make_lease_queue(redis_client, "other")
    busy = owner.claim(10, held=["another"])
    assert (busy.jobs, busy.is_quarantine_owner) == ((), True)
    ordinary = other.claim(10)
    assert ([job.id for job in ordinary.jobs], ordinary.is_quarantine_owner) == (["ordinary"], False)
    isolated = owner.claim(10)
    assert ([job.id for job in isolated.jobs], isolated.is_quarantine_owner) == (["quarantined"], True)
    assert owner.claim(10).is_quarantine_owner is False


@pytest.mark.parametrize("road", ["retry", "eta", "sent again"])
def test_quarantined_job_stays_isolated_on_every_road(redis_client: redis.Redis, road: str) -> None:
    """A job with two worker deaths that returns to a lane, or is sent again, is not claimed beside others."""
    redis_client.lpush(Lane.BULK.queue, message("crashing", Lane.BULK))
    crash(redis_client, "first")
    crash(redis_client, "second")
    redis_client.delete(QUARANTINE_OWNER)
    if road == "sent again":
        redis_client.lpush(Lane.BULK.queue, message("crashing", Lane.BULK))
    else:
        alone = make_lease_queue(redis_client, "alone")
        assert [job.id for job in alone.claim(5).jobs] == ["crashing"]
        assert alone.release([Release("crashing", delay_s=0.001, counts=road == "retry")]) == 1
        wait_until(lambda: make_maintenance(redis_client).run_once().promoted, timeout_s=5)
    redis_client.lpush(Lane.BULK.queue, *[message(job_id, Lane.BULK) for job_id in HARMLESS])
    redis_client.set(QUARANTINE_OWNER, "another")
    busy = make_lease_queue(redis_client, "busy")
    assert [job.id for job in busy.claim(10).jobs] == HARMLESS
    assert (redis_client.llen(Lane.BULK.queue), redis_client.llen(QUARANTINE)) == (0, 2 if road == "sent again" else 1)
    redis_client.delete(QUARANTINE_OWNER)
    owner = make_lease_queue(redis_client, "owner")
    [job] = owner.claim(10).jobs
    assert (job.id, job.deaths, job.key) == ("crashing", 2, Lane.BULK.queue)
    make_answer_store(redis_client, "owner").write([answer(job)])
    assert owner.claim(10).jobs == owner.claim(10).jobs == ()
    assert redis_client.exists(QUARANTINE, ATTEMPTS) == 0
