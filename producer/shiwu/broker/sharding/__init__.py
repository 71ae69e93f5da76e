"""Shards: jobs spread over the nodes of a Redis or Valkey Cluster. Other packages import from here.

A shard is a hash tag, a hash tag is a slot, and a slot is on one node. So a shard is used as one server: scripts,
transactions, subscriptions and `WAIT` work as they do there. `ShardRedis` adds the prefix with the tag to all keys, and
its connections go to the node that has the slot.
"""

from shiwu.broker.sharding.command_keys import UnknownCommand
from shiwu.broker.sharding.opening import keep_shard_count, open_shards
from shiwu.broker.sharding.shard_client import ShardRedis
from shiwu.broker.sharding.shards import ONE_SERVER, Shard, cluster_shard, shard_of

__all__ = [
    "ONE_SERVER",
    "Shard",
    "ShardRedis",
    "UnknownCommand",
    "cluster_shard",
    "keep_shard_count",
    "open_shards",
    "shard_of",
]
