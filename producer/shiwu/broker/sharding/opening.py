"""Opens one client for each shard, and keeps the number of shards."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import redis
from redis import exceptions
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

from shiwu.broker.connection import PoolOptions, open_client, place_and_login
from shiwu.broker.migration.old_names import OLD_RETENTION
from shiwu.broker.redis_errors import WrongShardCount
from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.broker.sharding.cluster_map import ClusterMap
from shiwu.broker.sharding.cluster_nodes import ClusterNodes
from shiwu.broker.sharding.shard_client import ShardRedis
from shiwu.broker.sharding.shards import cluster_shard
from shiwu.broker.sharding.slot_connection import (
    SlotConnection,
    SlotSSLConnection,
    ask_with,
    greet_node,
    open_node_with,
)
from shiwu.broker.steps import Steps, run
from shiwu.contract import RETENTION

SHARDS_FIELD: Final = "shards"
"""Field of the limits in shard 0: the number of shards with which the cluster was first used."""


def open_shards(url: str | RedisAddress, limits: PoolOptions) -> tuple[ShardRedis, ...]:
    """Open a client for each shard, in the order of their indexes. Nothing is sent yet; close each of them.

    `cluster://` gives as many as the URL names, each with a pool of its own; any other URL gives one, without a prefix.

    Args:
        limits: those of each client.

    Raises:
        RedisUrlError: the URL cannot work.
    """
    address = read_redis_url(url, may_be_cluster=True) if isinstance(url, str) else url
    if not address.shards:
        return (open_client(ShardRedis, address, limits),)
    others = {
        "connection_class": SlotConnection if address.tls is None else SlotSSLConnection,
        "redis_connect_func": greet_node,
        "cluster_map": open_map(address, timeout_s=limits.timeout_s, client_name=limits.client_name),
    }
    return tuple(
        open_client(ShardRedis, address, limits, **others, shard=cluster_shard(index))
        for index in range(address.shards)
    )


def open_map(address: RedisAddress, *, timeout_s: float, client_name: str | None = None) -> ClusterMap:
    """The map of the cluster at this address. Nothing is sent yet."""
    login, connection_class = _login(address, client_name=client_name)
    return ClusterMap(address.hosts, ask=ask_with(login, connection_class=connection_class), timeout_s=timeout_s)


def open_nodes(address: RedisAddress, limits: PoolOptions) -> ClusterNodes:
    """The nodes of the cluster at this address. Nothing is sent yet."""
    login, connection_class = _login(address, client_name=limits.client_name)
    return ClusterNodes(
        open_map(address, timeout_s=limits.timeout_s, client_name=limits.client_name),
        open_node=open_node_with(login, connection_class=connection_class, protocol=3),
        timeout_s=limits.timeout_s,
    )


def _login(address: RedisAddress, *, client_name: str | None) -> tuple[dict[str, Any], type]:
    """redis-py's arguments for a connection to any node, and its class."""
    found: dict[str, Any] = place_and_login(address, socket_class=UnixDomainSocketConnection, tls_class=SSLConnection)
    login = {name: value for name, value in found.items() if name not in {"host", "port", "connection_class"}}
    return {**login, "client_name": client_name}, Connection if address.tls is None else SSLConnection


def keep_shard_count(first: redis.Redis, *, shards: int) -> None:
    """Store the number of shards at the first use of a cluster, and refuse another number ever after.

    A user of Redis who may not write the limits only compares; without the right to read them nothing is checked.

    Args:
        first: the client of shard 0.
        shards: the number that the URL of this process says.

    Raises:
        WrongShardCount: the cluster was first used with another number.
        redis.RedisError: Redis is unavailable.
    """
    run(first, shard_count_steps(shards))


def shard_count_steps(shards: int) -> Steps[None]:
    """The steps of `keep_shard_count`, in shard 0."""
    found = None
    with suppress(exceptions.NoPermissionError):
        found = yield lambda client: client.hget(RETENTION, SHARDS_FIELD)
        if found is None:
            first = yield lambda client: client.hget(OLD_RETENTION, SHARDS_FIELD)
            yield lambda client: client.hsetnx(RETENTION, SHARDS_FIELD, first or str(shards))
            # Another process may have been faster.
            found = yield lambda client: client.hget(RETENTION, SHARDS_FIELD)
    if isinstance(found, bytes) and found != str(shards).encode():
        raise WrongShardCount(expected=found.decode(errors="replace")[:20], got=shards)


def node_of(client: redis.Redis) -> str:
    """`host:port` of the node that has the shard of this client, as the nodes of the cluster say; empty without shards.

    Raises:
        redis.RedisError: no node answers, or no node has the slot of the shard.
    """
    options = client.get_connection_kwargs()
    cluster_map: ClusterMap | None = options.get("cluster_map")
    if cluster_map is None:
        return ""
    host, port = cluster_map.primary_of(options["shard"].slot)
    return f"{host}:{port}"
