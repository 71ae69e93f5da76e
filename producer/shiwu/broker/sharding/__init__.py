"""Shards: jobs spread over the nodes of a Redis or Valkey Cluster. Other packages import from here.

A shard is a hash tag, a hash tag is a slot, and a slot is on one node. So a shard is used as one server: scripts,
transactions, subscriptions and `WAIT` work as they do there. `ShardRedis` adds the prefix with the tag to all keys, and
its connections go to the node that has the slot.
"""

from shiwu.broker.connection import PoolOptions
from shiwu.broker.sharding.cluster_map import ClusterMap
from shiwu.broker.sharding.cluster_nodes import ClusterNodes
from shiwu.broker.sharding.command_keys import UnknownCommand, with_prefix
from shiwu.broker.sharding.opening import (
    keep_shard_count,
    node_of,
    open_map,
    open_nodes,
    open_shards,
    shard_count_steps,
)
from shiwu.broker.sharding.reply_keys import KeyReader, take_prefix_from_replies
from shiwu.broker.sharding.shard_client import ShardRedis
from shiwu.broker.sharding.shards import ONE_SERVER, Shard, by_shard, cluster_shard, shard_of, shard_with_prefix
from shiwu.broker.sharding.slot_connection import (
    CelerySlotConnection,
    CelerySlotSSLConnection,
    check_node,
    leave_node,
)

__all__ = [
    "ONE_SERVER",
    "CelerySlotConnection",
    "CelerySlotSSLConnection",
    "ClusterMap",
    "ClusterNodes",
    "KeyReader",
    "PoolOptions",
    "Shard",
    "ShardRedis",
    "UnknownCommand",
    "by_shard",
    "check_node",
    "cluster_shard",
    "keep_shard_count",
    "leave_node",
    "node_of",
    "open_map",
    "open_nodes",
    "open_shards",
    "shard_count_steps",
    "shard_of",
    "shard_with_prefix",
    "take_prefix_from_replies",
    "with_prefix",
]
