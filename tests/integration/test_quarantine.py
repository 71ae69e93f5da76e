"""A message that kills its worker's process: it convicts itself alone, and the innocents around it are cleared."""

from __future__ import annotations

import redis

from shiwu.contract import ATTEMPTS, CLAIMS, QUARANTINE, QUARANTINE_OWNER, Lane
from shiwu_worker.jobs.job import Release
from tests.support.redis_parts import answer, make_committer, make_lease_queue, make_maintenance, message

INNOCENT = [f"job-{n}" for n in range(5)]


def die(client: redis.Redis, name: str) -> int:
    """A worker claims everything and dies; its leases end at once. How many jobs it held."""
    jobs = make_lease_queue(client, name, lease_s=0.0).claim(100).jobs
    make_maintenance(client).run_once()
    return len(jobs)


def test_the_guilty_convicts_itself_and_nobody_else(redis_client: redis.Redis) -> None:
    """Two deaths with six jobs each; then one at a time: five are answered, one is tried out."""
    for job_id in [*INNOCENT[:3], "guilty", *INNOCENT[3:]]:
        redis_client.lpush(Lane.BULK.queue, message(job_id, Lane.BULK))
    assert [die(redis_client, "first"), die(redis_client, "second")] == [6, 6]
    assert redis_client.llen(QUARANTINE) == 6
    deaths, answered = 0, []
    for number in range(20):
        redis_client.delete(QUARANTINE_OWNER)  # the lease of a taker that died has ended
        claims = make_lease_queue(redis_client, f"w{number}", lease_s=0.0)
        taken = claims.claim(100)
        if not taken.jobs:
            break
        [job] = taken.jobs
        if job.id == "guilty" and job.attempt <= 3:
            deaths += 1
            make_maintenance(redis_client).run_once()
        else:
            make_committer(redis_client, f"w{number}").write([answer(job)])
            answered.append((job.id, job.attempt))
    assert deaths == 1, "it died a third time, alone"
    assert sorted(answered) == sorted([*[(job_id, 3) for job_id in INNOCENT], ("guilty", 4)])
    assert redis_client.exists(QUARANTINE, CLAIMS, ATTEMPTS) == 0


def test_who_was_on_a_lost_device_twice_is_a_suspect(redis_client: redis.Redis) -> None:
    """A worker that gives back in good order accuses what was on the device; the second time it is tried alone."""
    redis_client.lpush(Lane.BULK.queue, message("job", Lane.BULK))
    for worker, places in (("first", (1, 0)), ("second", (0, 1))):
        claims = make_lease_queue(redis_client, worker)
        assert len(claims.claim(5).jobs) == 1
        assert claims.release([Release("job", counts=True)]) == 1
        assert (redis_client.llen(Lane.BULK.queue), redis_client.llen(QUARANTINE)) == places
    [job] = make_lease_queue(redis_client, "third").claim(5).jobs
    assert job.attempt == 3


def test_one_worker_takes_them_and_the_others_go_on(redis_client: redis.Redis) -> None:
    """The taker takes nothing else while suspects wait; everybody else claims as usual."""
    redis_client.lpush(Lane.BULK.queue, message("suspect", Lane.BULK))
    die(redis_client, "first")
    die(redis_client, "second")
    redis_client.lpush(Lane.BULK.queue, message("usual", Lane.BULK))
    redis_client.delete(QUARANTINE_OWNER)
    taker, other = make_lease_queue(redis_client, "taker"), make_lease_queue(redis_client, "other")
    busy = taker.claim(10, held=["another"])
    assert (busy.jobs, busy.alone) == ((), True)
    usual = other.claim(10)
    assert ([job.id for job in usual.jobs], usual.alone) == (["usual"], False)
    alone = taker.claim(10)
    assert ([job.id for job in alone.jobs], alone.alone) == (["suspect"], True)
    assert taker.claim(10).alone is False
