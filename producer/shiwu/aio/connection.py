"""Opens asyncio clients of Redis with a limited connection pool and a limit on every wait, as `shiwu.broker` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import BlockingConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialBackoff, NoBackoff

from shiwu.aio.slot_connection import SlotConnection, SlotSSLConnection
from shiwu.broker.connection import HEALTH_CHECK_S, busy_error, check_greeting, place_and_login, sentinel_login
from shiwu.broker.redis_url import read_redis_url
from shiwu.broker.sharding import KeyReader, Shard, check_node, cluster_shard, open_map, take_prefix_from_replies


class _Primary(redis.asyncio.Redis):
    """A client that disconnects from a server that has become a replica; its next connection resolves the name."""

    async def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        try:
            return await super().parse_response(connection, command_name, **options)
        except redis.ReadOnlyError:
            await connection.disconnect()
            raise


class _Pool(BlockingConnectionPool):
    """A pool whose callers wait for a free connection for a limited time; the error says what to change."""

    async def get_connection(self, command_name: str | None = None, *keys: Any, **options: Any) -> Any:
        try:
            return await super().get_connection()  # type: ignore[no-untyped-call]  # redis' own
        except redis.ConnectionError as error:
            if not isinstance(error.__cause__, TimeoutError) or self.can_get_connection():
                raise
            raise busy_error(max_connections=self.max_connections, waited_s=self.timeout or 0.0) from None


class _SentinelPool(SentinelConnectionPool, _Pool):
    """A pool of connections to the primary that the sentinels name."""


def connect(
    url: str, *, timeout_s: float, retries: int = 0, max_connections: int, has_health_check: bool = True
) -> tuple[redis.asyncio.Redis, ...]:
    """Open a client for each shard, which own their connections and limit every wait; one without `cluster://`.

    Nothing is sent yet; `close` ends each of them.

    Args:
        timeout_s: how long one command, one connection attempt or the wait for a free connection may take.
        retries: how often a command is repeated after a lost connection.
        max_connections: tasks beyond this number wait for a free connection of the same shard.
        has_health_check: whether an idle connection is checked before it is used.

    Raises:
        RedisUrlError: the URL cannot work.
    """
    address = read_redis_url(url, may_be_cluster=True)
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), retries) if retries else Retry(NoBackoff(), 0)
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": retry}
    options: dict[str, Any] = {
        **waits,
        "health_check_interval": HEALTH_CHECK_S if has_health_check else 0,
        **place_and_login(address, socket_class=UnixDomainSocketConnection, tls_class=SSLConnection),
        "redis_connect_func": _greet,
        "max_connections": max_connections,
        "timeout": timeout_s,
    }
    if address.shards:
        options |= {
            "connection_class": SlotConnection if address.tls is None else SlotSSLConnection,
            "redis_connect_func": _greet_node,
            "cluster_map": open_map(address, timeout_s=timeout_s),
        }
        return tuple(_open_shard(cluster_shard(index), options) for index in range(address.shards))
    if not address.primary:
        return (_Primary.from_pool(_Pool(**options)),)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis' own
        list(address.hosts), sentinel_kwargs=waits | sentinel_login(address)
    )
    primary: redis.asyncio.Redis = sentinel.master_for(
        address.primary, _Primary, connection_pool_class=_SentinelPool, **options
    )
    return (primary,)


def _open_shard(shard: Shard, options: dict[str, Any]) -> redis.asyncio.Redis:
    client = _Primary.from_pool(_Pool(**options, shard=shard))
    take_prefix_from_replies(client.response_callbacks, KeyReader(shard.prefix))
    return client


async def close(client: redis.asyncio.Redis) -> None:
    """Close the connections of a client from `connect`, also those to sentinels, which redis-py leaves open."""
    await client.aclose()
    if isinstance(client.connection_pool, _SentinelPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


async def _greet(connection: Any) -> None:
    """Log in, and refuse a cluster node or a sentinel before a command fails there with an unclear error.

    Raises:
        NotOneServer: the greeting of the server names cluster or sentinel mode.
    """
    check_greeting(await _log_in(connection))


async def _greet_node(connection: Any) -> None:
    """Log in, and refuse a server without cluster mode.

    Raises:
        NotACluster: the greeting of the server names another mode.
    """
    check_node(await _log_in(connection))


async def _log_in(connection: Any) -> object:
    """Log in on a new connection; the server's reply to HELLO, or None where it refuses HELLO."""
    with _recorded_replies(connection) as replies:
        # redis-py's health check would send a PING first, and call this function again where a login is missing.
        await connection.on_connect_check_health(check_health=False)
    greeting: object = next((reply for reply in replies if isinstance(reply, dict)), None)
    # redis-py before version 8 logs in without HELLO, so it is sent here. It is not sent twice: the user may lack the
    # right for it after the login, and the server would log that.
    if greeting is None:
        await connection.send_command("HELLO", check_health=False)
        # A proxy may not pass it on.
        with suppress(redis.ResponseError):
            greeting = await connection.read_response()
    return greeting


@contextmanager
def _recorded_replies(connection: Any) -> Iterator[list[Any]]:
    """What the connection reads meanwhile. redis-py's asyncio connection does not keep the greeting of its login."""
    replies: list[Any] = []
    read = connection.read_response

    async def read_and_record(*args: Any, **options: Any) -> Any:
        reply = await read(*args, **options)
        replies.append(reply)
        return reply

    connection.read_response = read_and_record
    try:
        yield replies
    finally:
        connection.read_response = read
