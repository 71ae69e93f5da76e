"""Steps of workers: claims, leases, answers and releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.celery_worker.callbacks import canvas_member
from shiwu_worker.jobs.job import Claimed, Job, Release, open_job
from shiwu_worker.stages.commit import to_entries
from tests.protocol.alphabet import FAULTS, step
from tests.protocol.simulated_redis import Fault
from tests.protocol.world import Worker, World

OUTCOMES: Final = {
    "tagged": None,
    "rejected": ErrorCode.SOURCE_NOT_FOUND,
    "failed": ErrorCode.INTERNAL_ERROR,
    "expired": ErrorCode.EXPIRED,
    "cancelled": ErrorCode.CANCELLED,
}
RELEASES: Final = {
    "unstarted": (0.0, False, ""),
    "deferred": (30.0, False, ""),
    "throttled": (30.0, False, "source_throttled|fetch"),
    "retried": (30.0, True, "source_unavailable|fetch"),
    "device_lost": (0.0, True, "device_lost|encode"),
}
"""Why a job is given back → delay in s, whether the attempt counts, its line in the history."""


@step(
    *((0, 1), (1, 2, 5), (*FAULTS, "late"), ("claim", "claim", "answer_duplicates")),
    scripts=["claim", "end_claims", "release", "answer_duplicates"],
    weight=22,
)
def claim(world: World, number: int, limit: int, fault: Fault, of: str = "claim") -> None:
    """A worker claims; the fault happens to one of its calls."""
    worker = world.workers[number]

    def call(_: World) -> None:
        world.notes.worker_token = worker.token
        world.notes.claim_held = len(worker.jobs)
        jobs = worker.queue.claim(limit, held=worker.held).jobs
        assert len(jobs) <= limit
        world.notes.claimed = jobs
        again = {job.id for job in jobs}
        worker.answered += [job for job in worker.jobs if job.id in again]
        worker.jobs = [*(job for job in worker.jobs if job.id not in again), *jobs]

    if (
        world.before.foreign
        or any(world.before.lanes.values())
        or world.before.quarantine
        or worker.queue.has_lost_reply
    ):
        world.perform("claim", call, fault, of=f"{of}.lua")


@step(weight=6)
def deliver(world: World) -> None:
    """The server runs a claim that its worker has already counted as failed."""
    if world.client.postponed:
        world.perform("claim", lambda w: w.client.deliver())


@step((0, 1), FAULTS, scripts=["end_claims", "release"], weight=2)
def drain(world: World, number: int, fault: Fault) -> None:
    """A worker claims nothing any more, gives back what it holds, and ends."""
    worker = world.workers[number]

    def call(_: World) -> None:
        world.notes.worker_token = worker.token
        world.notes.released = [(job_id, 0.0, False) for job_id in worker.held]
        world.again_if_failed(worker.queue.end)
        worker.queue.release([Release(job_id) for job_id in worker.held])

    if worker.jobs or worker.queue.has_lost_reply:
        world.perform("drain", call, fault, of="end_claims.lua")
        world.workers[number] = world.new_worker()


@step((0, 1), FAULTS, scripts=["renew"], weight=5)
def renew(world: World, number: int, fault: Fault) -> None:
    """A worker renews its leases, and is told which jobs it lost."""
    worker = world.workers[number]

    def call(_: World) -> None:
        world.notes.worker_token = worker.token
        lost = world.again_if_failed(lambda: worker.queue.renew(worker.held))
        mine = {job_id for job_id, one in world.before.claims.items() if one.token == worker.token}
        assert set(lost) == set(worker.held) - mine, "the reply names the jobs that were lost"

    if worker.jobs:
        world.perform("renew", call, fault)


@step((0, 1), tuple(OUTCOMES), (1, 2, 5), FAULTS, scripts=["commit"], weight=20)
def commit(world: World, number: int, outcome: str, count: int, fault: Fault) -> None:
    """A worker answers the oldest jobs that it believes to hold."""
    worker = world.workers[number]
    jobs, worker.jobs = worker.jobs[:count], worker.jobs[count:]
    if jobs:
        _commit(world, worker, jobs, outcome=outcome, fault=fault)
        worker.answered = [*worker.answered, *jobs][-4:]


@step((0, 1), ("tagged", "failed"), (0, 1, 2, 3), weight=6, scripts=["commit"])
def commit_again(world: World, number: int, outcome: str, which: int) -> None:
    """A worker answers a job that it answered before, as after a long pause."""
    worker = world.workers[number]
    if which < len(worker.answered):
        _commit(world, worker, [worker.answered[which]], outcome=outcome, fault="")


def _commit(world: World, worker: Worker, jobs: Sequence[Claimed], *, outcome: str, fault: Fault) -> None:
    ended = [_ended(claimed, outcome) for claimed in jobs]

    def call(_: World) -> None:
        world.notes.worker_token = worker.token
        world.notes.committed = [(job.id, job.raw, job.generation) for job in ended]
        entries = to_entries(ended, worker=worker.token, now_s=ended[0].moments.claimed_s + 1)
        discarded = world.again_if_failed(lambda: worker.store.write(entries))
        worker.members += [
            canvas_member(job.id, job.generation) for job in ended if job.has_callbacks and job.id not in discarded
        ]

    world.perform("commit", call, fault)


def _ended(claimed: Claimed, outcome: str) -> Job:
    job = open_job(claimed)
    code = OUTCOMES[outcome]
    if code is not None:
        job.fail(ErrorInfo(code=code, message="made by the explorer", stage=Stage.FETCH))
    return job


@step((0, 1), tuple(RELEASES), FAULTS, scripts=["release"], weight=10)
def release(world: World, number: int, kind: str, fault: Fault) -> None:
    """A worker gives back all that it believes to hold."""
    delay_s, counts, ending = RELEASES[kind]
    worker = world.workers[number]
    jobs, worker.jobs = worker.jobs, []
    releases = [Release(job.id, delay_s=delay_s, counts=counts, ending=ending) for job in jobs]

    def call(_: World) -> None:
        world.notes.worker_token = worker.token
        world.notes.released = [(job.id, delay_s, counts) for job in jobs]
        mine = [job for job in jobs if job.id in world.before.claims]
        mine = [job for job in mine if world.before.claims[job.id].token == worker.token]
        released = world.again_if_failed(lambda: worker.queue.release(releases))
        assert fault == "lost" or released == len(mine), "the reply is the number of jobs that were still held"

    if jobs:
        world.perform("release", call, fault)


@step((0, 1), weight=4)
def crash(world: World, number: int) -> None:
    """A worker's process ends, and another one begins."""
    if world.workers[number].jobs:
        world.workers[number] = world.new_worker()
        world.done += 1
