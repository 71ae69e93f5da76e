"""asyncio connections to the node that has the slot of a shard, as `shiwu.broker.sharding` has blocking ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import redis
from redis.asyncio.connection import Connection, SSLConnection

from shiwu.broker.sharding import ClusterMap, KeyReader, Shard, leave_node, with_prefix

if TYPE_CHECKING:
    _Base = Connection
else:
    _Base = object


class _ToSlot(_Base):
    """Part of a connection class: connects to the primary of the shard's slot, and adds the prefix of the shard."""

    def __init__(self, *, shard: Shard, cluster_map: ClusterMap, **options: Any) -> None:
        super().__init__(**options)
        self.shard = shard
        self._map = cluster_map
        self._reader_of_keys = KeyReader(shard.prefix)

    async def _connect(self) -> Any:
        # A thread, because the map may have to ask nodes, and several connections share its answer.
        self.host, self.port = await asyncio.to_thread(self._map.primary_of, self.shard.slot or 0)
        try:
            return await super()._connect()  # type: ignore[no-untyped-call]  # redis' own
        except OSError:
            await asyncio.to_thread(self._map.distrust)
            raise

    # redis-py packs single commands, pipelines and subscriptions by this method.
    def pack_command(self, *args: Any) -> Any:
        """The bytes of one command."""
        return super().pack_command(*with_prefix(self.shard.prefix, args))

    async def read_response(self, *args: Any, push_request: bool | None = False, **options: Any) -> Any:
        """The next reply, or with `push_request` the next notification.

        Raises:
            redis.ConnectionError: also where the node refuses the slot. The next command goes to its present node.
        """
        try:
            reply = await super().read_response(*args, push_request=push_request, **options)
        except redis.RedisError as error:
            if (moved := leave_node(error, self._map, shard=self.shard, node=(self.host, self.port))) is None:
                raise
            await self.disconnect(nowait=True)
            raise moved from error
        return self._reader_of_keys.push(reply) if push_request else reply


class SlotConnection(_ToSlot, Connection):
    """A connection to the primary of a shard."""


class SlotSSLConnection(_ToSlot, SSLConnection):
    """As `SlotConnection`, over TLS."""
