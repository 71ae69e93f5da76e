"""Steps of what is around: time, other programs, and what workers write for others."""

from __future__ import annotations

from typing import Final

import redis

from shiwu.broker.known_labels import KnownLabels, KnownLabelStore
from shiwu.broker.queue_stats import shared_snapshot
from shiwu.broker.retention import RetentionPublisher
from shiwu.contract import DEADLINES, KEY_TYPES, done_key, result_key
from tests.protocol.alphabet import step
from tests.protocol.snapshot import LANE_KEYS
from tests.protocol.world import IDS, OF_WORKERS, UNSENT_ID, World

SPOILED: Final = (
    *(*KEY_TYPES, *LANE_KEYS),
    *(prefix + job_id for prefix in (done_key(""), result_key("")) for job_id in IDS),
)
"""Keys under which another program may write a value of a wrong type."""


@step((1_000, 1_000, 31_000, 31_000, 61_000, 61_000, 61_000, 4_000_000, 25_000_000), weight=6)
def advance(world: World, by_ms: int) -> None:
    """Time passes; the longest times are longer than marks and dead letters are kept."""
    move_clock(world, by_ms)


@step((30_000, 100_000, 1_000_000), weight=1)
def set_back(world: World, by_ms: int) -> None:
    """The server's clock is set back."""
    world.set_back_ms += by_ms
    move_clock(world, -by_ms)


def move_clock(world: World, by_ms: int) -> None:
    """Let the server's clock go on, or back."""

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
