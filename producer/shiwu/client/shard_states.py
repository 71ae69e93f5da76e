"""The sizes of each shard, also while some are unavailable."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from shiwu.broker.queue_stats import QueueState, state_steps
from shiwu.broker.redis_errors import explain
from shiwu.broker.sharding import ShardRedis, node_of
from shiwu.broker.steps import run


@dataclass(frozen=True, slots=True)
class ShardState:
    """One shard; without a cluster the only one, which has no tag, no slot and no node."""

    index: int
    tag: str
    """The hash tag of its keys."""
    slot: int | None
    node: str
    """`host:port` of the node that has the slot; empty where no node says so."""
    state: QueueState | None
    """None while the shard is unavailable."""
    error: str | None
    """Why it is unavailable."""


def read_shards(clients: tuple[ShardRedis, ...]) -> tuple[ShardState, ...]:
    """Count the queues of each shard now.

    Args:
        clients: one for each shard.
    """
    states: dict[int, QueueState | Exception] = {}
    for shard, client in enumerate(clients):
        try:
            states[shard] = run(client, state_steps())
        except (redis.RedisError, OSError) as error:
            states[shard] = error
    return tuple(_shard_state(client, states[shard]) for shard, client in enumerate(clients))


def _shard_state(client: ShardRedis, found: QueueState | Exception) -> ShardState:
    try:
        node = node_of(client)
    except redis.RedisError:
        node = ""
    return ShardState(
        index=client.shard.index,
        tag=client.shard.tag,
        slot=client.shard.slot,
        node=node,
        state=None if isinstance(found, Exception) else found,
        error=explain(found) if isinstance(found, Exception) else None,
    )
