"""Connections to the nodes of a cluster, over which one command after another asks for keys of different shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import redis

from shiwu.broker.sharding.cluster_map import ClusterMap, Node
from shiwu.broker.sharding.shards import Shard
from shiwu.broker.sharding.slot_connection import leave_node

OpenNode: TypeAlias = Callable[[Node, float], Any]
"""Gives a connection of redis-py to a node, not connected yet, whose every wait has this limit in seconds."""


class ClusterNodes:
    """Which node has a shard, and connections to nodes. Thread-safe.

    Such a connection adds no prefix to keys, and stays with its node when a slot moves.

    Args:
        timeout_s: limit of each wait of a connection.
    """

    def __init__(self, cluster_map: ClusterMap, *, open_node: OpenNode, timeout_s: float) -> None:
        self._map = cluster_map
        self._open_node = open_node
        self._timeout_s = timeout_s

    def node_of(self, shard: Shard) -> Node:
        """The node that has the shard.

        Raises:
            redis.RedisError: no node answers, or none has the slot of the shard.
        """
        return self._map.primary_of(shard.slot or 0)

    def connect(self, node: Node) -> Any:
        """A new connection to the node, by RESP3, so that the node can notify it. The caller disconnects it.

        Raises:
            redis.RedisError: the node does not answer, or refuses the login.
        """
        connection = self._open_node(node, self._timeout_s)
        connection.connect()
        return connection

    def has_moved(self, error: redis.RedisError, *, shard: Shard, node: Node) -> bool:
        """Whether this error of a command means that the node does not have the shard; then the map knows it."""
        return leave_node(error, self._map, shard=shard, node=node) is not None
