"""One connection that is subscribed to the announcements of answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import redis
import redis.asyncio

from shiwu.aio.cancellation import cancellable
from shiwu.broker.chunks import chunks
from shiwu.broker.sharding import ONE_SERVER, Shard
from shiwu.client.announcements import CHUNK_SIZE, IN_SHARD, ON_ONE_SERVER, channels, id_of

UNLIMITED_S: Final = 86_400.0
"""Given to redis-py for reads that the caller limits by `asyncio.timeout`."""


class Subscription:
    """A connection that listens on the channels of result keys. Used by one task.

    redis-py's PubSub connects again by itself inside of a read; a read that is cancelled meanwhile would leave a
    connection without login. This class closes the connection instead, and its caller opens another one.

    Args:
        timeout_s: how long the server may take to answer a ping.
    """

    def __init__(self, client: redis.asyncio.Redis, *, timeout_s: float) -> None:
        self._pool: Any = client.connection_pool
        self._timeout_s = timeout_s
        shard: Shard = self._pool.connection_kwargs.get("shard", ONE_SERVER)
        self._commands = IN_SHARD if shard.prefix else ON_ONE_SERVER
        self._ending: Counter[str] = Counter()
        """Channels whose end this object asked for, and the server has not confirmed."""
        self._connection: Any = None
        self._pinged_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    async def open(self) -> None:
        """Connect, with no subscription.

        Raises:
            redis.RedisError: Redis is unavailable, or refuses the connection.
        """
        with cancellable():
            self._connection = await self._pool.get_connection()
        self._ending.clear()
        self._pinged_s = None

    async def add(self, ids: Iterable[str]) -> None:
        """Subscribe to the answers of these ids. Confirmations are read later, and skipped."""
        await self._send(self._commands.subscribe, channels(ids))

    async def remove(self, ids: Iterable[str]) -> None:
        """Unsubscribe from the answers of these ids."""
        ended = channels(ids)
        if self._commands is IN_SHARD:
            self._ending.update(ended)
        await self._send(self._commands.unsubscribe, ended)

    async def ping(self) -> None:
        """Ask whether the connection still works.

        Raises:
            redis.TimeoutError: nothing came since an earlier ping for `timeout_s`.
        """
        now_s = time.monotonic()
        if self._pinged_s is None:
            self._pinged_s = now_s
            with cancellable():
                await self._connection.send_command("PING", check_health=False)
        elif now_s - self._pinged_s >= self._timeout_s:
            raise redis.TimeoutError(f"expected a reply to a ping within {self._timeout_s:g} s, got none")

    async def read(self) -> tuple[str, bytes] | None:
        """The id and the value of the next announced answer; None for a message that announces nothing.

        A cancellation loses no message. The caller limits the wait.

        Raises:
            redis.RedisError: the connection was lost, the server refused a command, or it ended a subscription, because
                the slot of the shard has moved.
        """
        message = await self._connection.read_response(
            timeout=UNLIMITED_S, disconnect_on_error=False, push_request=True
        )
        self._pinged_s = None
        if not isinstance(message, list) or len(message) != 3:
            return None
        kind, channel, raw = message
        if kind == self._commands.message:
            return id_of(channel), raw
        if kind == IN_SHARD.unsubscribed:
            self._note_end(channel.decode())
        return None

    def _note_end(self, channel: str) -> None:
        self._ending[channel] -= 1
        if self._ending[channel] < 0:
            raise redis.ConnectionError("the node ended a subscription: its slot has moved; subscribe again")
        if not self._ending[channel]:
            del self._ending[channel]

    async def close(self) -> None:
        """Close the connection, and with it all subscriptions."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            with suppress(redis.RedisError, OSError):
                await connection.disconnect(nowait=True)
        finally:
            await asyncio.shield(self._pool.release(connection))

    async def _send(self, command: str, names: Sequence[str]) -> None:
        for portion in chunks(names, CHUNK_SIZE):
            with cancellable():
                await self._connection.send_command(command, *portion, check_health=False)
