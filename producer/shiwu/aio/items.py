"""The items of the results stream, as `shiwu.aio.Client.results` yields them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import redis.asyncio

from shiwu.aio.run_steps import run
from shiwu.client.results import TagResult
from shiwu.client.stream_items import ack_steps


@dataclass(frozen=True)
class StreamItem:
    """One answer of the results stream. It belongs to this consumer until `ack`, or until it is idle for too long."""

    entry_id: str
    """Id of the entry in the stream; over shards after the index of its shard, as in `7/1764500000000-0`."""
    result: TagResult
    """The answer, whatever its status."""
    _client: redis.asyncio.Redis
    _group: str
    generation: int = 0
    """How often the dead letter of this id was requeued before this answer."""

    async def ack(self, *, away_s: float = 0.0) -> None:
        """Acknowledge the answer: the group does not get it again. May be called from any task.

        Args:
            away_s: how long to retry while Redis is unavailable, in seconds.

        Raises:
            redis.RedisError: the answer is not acknowledged, and will be delivered again.
        """
        await run(self._client, ack_steps([self.entry_id], group=self._group, away_s=away_s))


@dataclass(frozen=True)
class UnreadableItem:
    """An entry of the results stream that this version of the client cannot read.

    It stays pending, so that the group gets it again after an upgrade of the client; `ack` gives it up.
    """

    entry_id: str
    """Id of the entry in the stream; over shards after the index of its shard."""
    fields: Mapping[bytes, bytes]
    """The fields of the entry as they are in Redis."""
    reason: str
    """Why it cannot be read."""
    _client: redis.asyncio.Redis
    _group: str

    async def ack(self) -> None:
        """Give the entry up: the group does not get it again."""
        await run(self._client, ack_steps([self.entry_id], group=self._group))
