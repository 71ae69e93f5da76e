"""Steps of clients: jobs are sent, cancelled, requeued and dropped, and answers are read."""

from __future__ import annotations

from itertools import islice
from typing import Final

from shiwu.client.shard_stream import follow
from shiwu.client.stream import StreamOptions
from shiwu.contract import Lane
from tests.protocol.alphabet import REPEATS, step
from tests.protocol.simulated_redis import Fault
from tests.protocol.world import IDS, OF_CLIENTS, UNSENT_ID, World
from tests.support.redis_parts import cancel as client_cancel

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


@step(IDS, KINDS, ("interactive", "bulk"), weight=14)
def enqueue(world: World, job_id: str, kind: str, lane: str) -> None:
    """Send a job, perhaps with an id that was sent before."""
    world.perform("enqueue", lambda w: w.enqueue(job_id, kind, Lane(lane)))


@step((*IDS, UNSENT_ID), REPEATS, scripts=["commit"], weight=4)
def cancel(world: World, job_id: str, fault: Fault) -> None:
    """A client cancels a job, wherever it is."""

    def call(_: World) -> None:
        world.again_if_failed(lambda: client_cancel(world.client, job_id, retention=OF_CLIENTS))

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
        on_unreadable=lambda *_: None,
    )

    def call(_: World) -> None:
        for item in islice(follow((world.client,), (world.client,), options), 1):
            item.ack()

    if world.before.stream:
        world.perform("consume", call)
