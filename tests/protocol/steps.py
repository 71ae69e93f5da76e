"""The alphabet of schedules: each step with the values of its arguments and the scripts that it runs.

A step names ids, workers and outcomes by plain values, and does nothing where there is nothing to do, so that any
part of a schedule is a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Final

import redis

from shiwu.broker.known_labels import KnownLabels, KnownLabelStore
from shiwu.broker.queue_stats import shared_snapshot
from shiwu.broker.retention import RetentionPublisher
from shiwu.client.stream import StreamOptions, follow
from shiwu.contract import (
    DEADLINES,
    HISTORY,
    KEY_TYPES,
    PENDING_CALLBACK_ANSWER,
    ErrorCode,
    ErrorInfo,
    Lane,
    Stage,
    done_key,
    result_key,
)
from shiwu_worker.celery_worker.callbacks import canvas_member
from shiwu_worker.jobs.job import Claimed, Job, Release, open_job
from shiwu_worker.stages.commit import to_entries
from tests.protocol.simulated_redis import Fault
from tests.protocol.snapshot import LANE_KEYS
from tests.protocol.world import IDS, OF_WORKERS, UNSENT_ID, SenderCrashed, Worker, World

FAULTS: Final[Sequence[Fault]] = ("", "", "", "", "lost", "unsent")
"""For callers that are told of a lost reply."""
REPEATS: Final[Sequence[Fault]] = ("", "", "", "", "lost", "repeated")
"""For clients that repeat a command by themselves."""
KINDS: Final = (
    "plain",
    "plain",
    "plain",
    "urgent",
    "callbacks",
    "callbacks",
    "callbacks",
    "callbacks_expires",
    "expires",
    "answer_by",
    "no_result",
)
OUTCOMES: Final = {
    "tagged": None,
    "rejected": ErrorCode.SOURCE_NOT_FOUND,
    "failed": ErrorCode.INTERNAL_ERROR,
    "expired": ErrorCode.EXPIRED,
    "cancelled": ErrorCode.CANCELLED,
}
SWEEPS: Final = ("maintain", "take_late", "take_late", "commit", "trim", "move_foreign", "drop_answered")
"""Scripts that a sweep runs."""
RELEASES: Final = {
    "unstarted": (0.0, False, ""),
    "deferred": (30.0, False, ""),
    "throttled": (30.0, False, "source_throttled|fetch"),
    "retried": (30.0, True, "source_unavailable|fetch"),
    "device_lost": (0.0, True, "device_lost|encode"),
}
"""Why a job is given back → delay in s, whether the attempt counts, its line in the history."""
SPOILED: Final = (
    *(*KEY_TYPES, *LANE_KEYS),
    *(prefix + job_id for prefix in (done_key(""), result_key(""), PENDING_CALLBACK_ANSWER, HISTORY) for job_id in IDS),
)
"""Keys under which another program may write a value of a wrong type."""


@dataclass(frozen=True, slots=True)
class Step:
    """One letter of the alphabet."""

    name: str
    run: Callable[..., None]
    domains: Sequence[Sequence[Any]]
    scripts: Sequence[str]
    """Files of the scripts that it runs."""
    weight: int


STEPS: Final[dict[str, Step]] = {}


def step(*domains: Sequence[Any], scripts: Sequence[str] = (), weight: int = 4) -> Callable[..., Any]:
    """Add a function to the alphabet; each domain has the values of one argument."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        name = run.__name__
        STEPS[name] = Step(name, run, domains, [f"{script}.lua" for script in scripts], weight)
        return run

    return add


# ------------------------------------------------------------------------------------- clients
@step(IDS, KINDS, ("interactive", "bulk"), weight=14)
def enqueue(world: World, job_id: str, kind: str, lane: str) -> None:
    """Send a job, perhaps with an id that was sent before."""
    world.perform("enqueue", lambda w: w.enqueue(job_id, kind, Lane(lane)))


@step((*IDS, UNSENT_ID), REPEATS, scripts=["commit"], weight=4)
def cancel(world: World, job_id: str, fault: Fault) -> None:
    """A client cancels a job, wherever it is."""

    def call(_: World) -> None:
        world.again_if_failed(lambda: world.store.cancel([job_id], reason="", clock_ms=lambda: world.client.now_ms))

    if job_id == UNSENT_ID or job_id in world.sent.values():
        world.perform("cancel", call, fault)


@step((*IDS, UNSENT_ID), REPEATS, scripts=["requeue"], weight=14)
def requeue(world: World, job_id: str, fault: Fault) -> None:
    """A client requeues a dead letter."""
    if job_id not in world.before.dead and not (job_id == UNSENT_ID and world.before.dead):
        return

    def call(_: World) -> None:
        now = world.before
        is_free = job_id in now.dead and job_id not in now.claims and job_id not in now.delayed
        world.notes.requeued = [job_id] if is_free else []
        requeued = world.again_if_failed(lambda: world.letters.requeue([job_id]))
        if fault != "lost" and not now.foreign:
            assert requeued == world.notes.requeued, "the reply names what was requeued"

    world.perform("requeue", call, fault)


@step(IDS, REPEATS, scripts=["drop"], weight=1)
def drop(world: World, job_id: str, fault: Fault) -> None:
    """A client deletes a dead letter."""
    if job_id in world.before.dead:
        world.perform("drop", lambda w: w.again_if_failed(lambda: w.letters.drop([job_id])), fault)


@step((1, 2), scripts=["hold_entries", "drop_consumers"], weight=1)
def consume(world: World, batch: int) -> None:
    """A consumer takes one answer of the stream, and ends."""
    options = StreamOptions(
        group="explorer",
        consumer="reader",
        is_temporary=True,
        batch=batch,
        block_s=0.001,
        reclaim_idle_s=0.0,
        stop_when_idle=True,
        away_s=0.0,
        on_unreadable=lambda _: None,
    )

    def call(_: World) -> None:
        for item in islice(follow(world.client, world.client, options), 1):
            item.ack()

    if world.before.stream:
        world.perform("consume", call)


# ------------------------------------------------------------------------------------- workers
@step((0, 1), (1, 2, 5), (*FAULTS, "late"), scripts=["claim", "end_claims", "release"], weight=22)
def claim(world: World, number: int, limit: int, fault: Fault) -> None:
    """A worker claims."""
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
        world.perform("claim", call, fault, of="claim.lua")


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


@step((0, 1), FAULTS, scripts=["maintain"], weight=6)
def maintain(world: World, number: int, fault: Fault) -> None:
    """A worker does maintenance."""
    maintenance = world.workers[number].maintenance

    def call(_: World) -> None:
        maintenance.trim_if_long(world.again_if_failed(maintenance.run_once))

    world.perform("maintain", call, fault)


@step(SWEEPS, ("", "lost", "repeated"), scripts=SWEEPS, weight=4)
def sweep(world: World, script: str, fault: Fault) -> None:
    """A sweep does all that is due; the fault happens to one of its calls."""
    world.perform("sweep", lambda w: w.sweeper.sweep(), fault, of=f"{script}.lua")


@step(
    (0, 1), ("take_late", "commit"), ("claim", "claim_and_defer", "commit", "maintain", "requeue", "cancel"), weight=5
)
def sweep_interrupted(world: World, number: int, before: str, what: str) -> None:
    """A sweep does all that is due; before one of its calls, a worker or a client does something."""

    def meanwhile() -> None:
        world.checkpoint()
        if what in {"claim", "claim_and_defer"}:
            claim(world, number, 5, "")
            if what == "claim_and_defer":
                release(world, number, "deferred", "")
        elif what == "commit":
            commit(world, number, "failed", 5, "")
        elif what == "maintain":
            maintain(world, number, "")
        else:
            for job_id in IDS:
                (requeue if what == "requeue" else cancel)(world, job_id, "")

    def call(_: World) -> None:
        world.client.interruptions = {f"{before}.lua": meanwhile}
        world.sweeper.sweep()

    world.perform("sweep", call)
    world.client.interruptions = {}


@step(("workers", "sweep"), ("length", "bytes", "dead"), REPEATS, scripts=["trim", "trim_dead"], weight=1)
def trim(world: World, who: str, what: str, fault: Fault) -> None:
    """Somebody trims the stream or the dead letters."""
    maintenance = world.sweeper if who == "sweep" else world.workers[0].maintenance
    calls: dict[str, Callable[[], object]] = {
        "length": maintenance.trim,
        "bytes": lambda: maintenance.trim(bytes_over=1),
        "dead": lambda: maintenance.trim_dead(bytes_over=1),
    }
    world.perform("trim", lambda w: w.again_if_failed(calls[what]), fault)


@step((*IDS, UNSENT_ID), FAULTS, scripts=["revoke", "commit"], weight=3)
def revoke(world: World, job_id: str, fault: Fault) -> None:
    """Celery's revoke names an id."""
    revoker = world.workers[0].revoker
    if job_id == UNSENT_ID or job_id in world.sent.values():
        world.perform("revoke", lambda w: w.again_if_failed(lambda: revoker.revoke([job_id])), fault)


# ------------------------------------------------------------------------------------- callbacks
@step((0, 1), ("own", "left"), FAULTS, scripts=["take_callbacks", "hold_callbacks", "drop_callbacks"], weight=14)
def send_callbacks(world: World, number: int, which: str, fault: Fault) -> None:
    """A worker sends callbacks: of its own answers, or what others left."""
    worker = world.workers[number]
    members, worker.members = (worker.members, []) if which == "own" else ([], worker.members)
    if members or (which == "left" and world.before.callbacks):
        world.perform("send", lambda _: worker.sender.send_chunk(members), fault)


@step((0, 1), ("before", "after"), scripts=["take_callbacks"], weight=4)
def crash_while_sending(world: World, number: int, when: str) -> None:
    """A worker's process ends before or after it has sent callbacks, and does not delete them."""
    worker = world.workers[number]

    def end() -> None:
        if when == "before":
            world.sends.pop()
        else:
            world.may_send_again.add(world.interrupted)
        raise SenderCrashed

    def call(_: World) -> None:
        world.interruption = end
        with suppress(SenderCrashed):
            worker.sender.send_chunk(worker.members)
        world.interruption = None

    if world.before.callbacks:
        world.perform("send", call)
        world.workers[number] = world.new_worker()


@step((0, 1), ("poll", "own", "slow", "requeue", "renewed"), scripts=["take_callbacks"], weight=8)
def send_interrupted(world: World, number: int, what: str) -> None:
    """While a worker sends callbacks, another one looks for some, time passes, or dead letters are requeued."""
    worker, other = world.workers[number], world.workers[1 - number]

    def meanwhile() -> None:
        if what == "slow":
            world.may_send_again.add(world.interrupted)
            _advance(world, 31_000)
        elif what == "renewed":
            _advance(world, 20_000)
        if what == "requeue":
            for job_id in IDS:
                requeue(world, job_id, "")
        else:
            members = other.members if what == "own" else []
            world.perform("send", lambda _: other.sender.send_chunk(members))

    def call(_: World) -> None:
        members, worker.members = worker.members, []
        world.interruption = meanwhile
        worker.sender.send_chunk(members)
        world.interruption = None

    if world.before.callbacks:
        world.perform("send", call)


# ------------------------------------------------------------------------------------- surroundings
@step((1_000, 1_000, 31_000, 31_000, 61_000, 61_000, 61_000, 4_000_000, 25_000_000), weight=6)
def advance(world: World, by_ms: int) -> None:
    """Time passes; the longest times are longer than marks and dead letters are kept."""
    _advance(world, by_ms)


@step((30_000, 100_000, 1_000_000), weight=1)
def set_back(world: World, by_ms: int) -> None:
    """The server's clock is set back."""
    world.set_back_ms += by_ms
    _advance(world, -by_ms)


def _advance(world: World, by_ms: int) -> None:
    def call(_: World) -> None:
        world.notes.moved_clock_ms = by_ms
        world.client.move_clock(by_ms)

    world.perform("advance", call)


@step(SPOILED, weight=2)
def spoil(world: World, key: str) -> None:
    """Another program writes a value of a wrong type under a key of ours that does not exist."""
    client = world.client

    def call(_: World) -> None:
        if KEY_TYPES.get(key, "string" if key not in LANE_KEYS else "list") == "string":
            client.rpush(key, "foreign")
        else:
            client.set(key, "foreign")

    if key not in world.before.keys:
        world.perform("spoil", call)


@step((*IDS, UNSENT_ID), weight=1)
def write_deadline(world: World, job_id: str) -> None:
    """A producer writes a deadline that has passed for any id, which is an index only."""
    if DEADLINES not in world.before.foreign:
        world.perform("write_deadline", lambda w: w.client.zadd(DEADLINES, {job_id: w.client.now_ms - 1}))


@step((0, 1), weight=1)
def unspoil(world: World, number: int) -> None:
    """A worker moves foreign values aside; those under the keys of one id end by the operator."""
    if world.before.foreign:
        world.perform("move_foreign", lambda w: w.workers[number].maintenance.move_foreign())


@step(("labels", "retention", "snapshot"), scripts=["note_labels"], weight=1)
def keep_books(world: World, what: str) -> None:
    """A worker writes what others read: label sets, retention, the queue snapshot."""
    client: redis.Redis = world.client

    def call(_: World) -> None:
        if what == "labels":
            KnownLabelStore(client).note([KnownLabels(digest="d", labels=("猫",))])
        elif what == "retention":
            RetentionPublisher(client, OF_WORKERS)()
        else:
            shared_snapshot(client, max_age_s=5)

    world.perform("keep_books", call)


def letters(names: Sequence[str] = ()) -> list[tuple[str, tuple[Any, ...]]]:
    """Every step with every value of its arguments."""
    return [
        (found.name, arguments)
        for found in STEPS.values()
        if not names or found.name in names
        for arguments in dict.fromkeys(product(*found.domains))
    ]
