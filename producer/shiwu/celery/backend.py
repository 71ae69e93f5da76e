"""Celery's result backend for Redis in one shard of a cluster, as `shiwu.celery.options` configures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
from celery.backends.redis import RedisBackend
from redis.client import PubSub

from shiwu.broker.sharding import CelerySlotConnection, CelerySlotSSLConnection
from shiwu.celery.slots import follow_shard, once_more


class Client(redis.Redis):
    """A client that repeats a refused command once, with subscriptions that do not connect again by themselves.

    Celery reads the results that it missed only if a lost connection raises an error.
    """

    def __init__(self, *, commands: redis.ConnectionPool, subscriptions: redis.ConnectionPool) -> None:
        super().__init__(connection_pool=commands)
        self._subscriptions = subscriptions

    def pubsub(self, **options: Any) -> PubSub:
        """A new object for subscriptions."""
        return PubSub(self._subscriptions, **options)

    def close(self) -> None:
        """Close all connections."""
        super().close()
        self._subscriptions.disconnect()


class ShardBackend(RedisBackend):  # type: ignore[misc]  # celery has no types
    """Results in a shard, also while it moves or while a replica takes over: reading them is tried for 20 s."""

    connection_class_ssl = CelerySlotSSLConnection

    def get(self, key: Any) -> Any:
        """The value of a key."""
        return self.ensure(super().get, (key,))

    def mget(self, keys: Sequence[Any]) -> Any:
        """The values of keys."""
        return self.ensure(super().mget, (keys,))

    def _create_client(self, **arguments: Any) -> Client:
        more = self._transport_options
        found = {"connection_class": CelerySlotConnection} | follow_shard(
            arguments, nodes=more.get("cluster_nodes", ""), prefix=more.get("global_keyprefix", "")
        )
        return Client(commands=self._get_pool(**found, retry=once_more()), subscriptions=self._get_pool(**found))
