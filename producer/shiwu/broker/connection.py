"""Opens Redis clients with a limited connection pool and a limit on every wait."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from queue import Empty
from typing import Any, Final

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.connection import BlockingConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from shiwu.broker.redis_errors import ConnectionsBusy, NotOneServer
from shiwu.broker.redis_url import RedisAddress, read_redis_url

MAX_CONNECTIONS: Final = 16
"""Default size of a connection pool."""


class _Primary(redis.Redis):
    """A client that disconnects from a server that has become a replica. Its next connection resolves the name again.

    Managed services move a primary by changing its DNS name; sentinels are asked at each new connection.
    """

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        try:
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis' own
        except redis.ReadOnlyError:
            connection.disconnect()
            raise


class _Pool(BlockingConnectionPool):
    """A pool whose callers wait for a free connection for a limited time; the error says what to change."""

    def get_connection(self, command_name: str | None = None, *keys: Any, **options: Any) -> Any:
        try:
            return super().get_connection()  # type: ignore[no-untyped-call]  # redis' own
        except redis.ConnectionError as error:
            if not isinstance(error.__context__, Empty):
                raise
            raise ConnectionsBusy(
                f"expected one of {self.max_connections} connections to Redis to become free within "
                f"{self.timeout:g} s, all stayed in use; raise max_connections of Client, or use fewer threads"
            ) from None


class _SentinelPool(SentinelConnectionPool, _Pool):
    """A pool of connections to the primary that the sentinels name."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Close all connections, or only idle ones, which older versions of redis-py do not distinguish."""
        if inuse_connections:
            super().disconnect()
            return
        for connection in list(self.pool.queue):
            if connection is not None:
                connection.disconnect()


def connect(
    url: str | RedisAddress,
    *,
    timeout_s: float,
    block_s: float = 0.0,
    retries: int = 0,
    client_name: str | None = None,
    max_connections: int = MAX_CONNECTIONS,
    pool_wait_s: float | None = None,
) -> redis.Redis:
    """Open a client that owns its connections and limits every wait. Nothing is sent yet; `close` ends it.

    Args:
        timeout_s: how long one command or one connection attempt may take.
        block_s: how long the longest blocking command of this client asks the server to wait.
        retries: how often a command is repeated after a lost connection. Workers use 0, because the caller of the
            command decides whether to repeat it.
        max_connections: threads beyond this number wait for a free connection. Code that holds a connection must not
            ask the same client for another one, because such threads could block each other until the time-out.
        pool_wait_s: how long to wait for a free connection; default `timeout_s`.

    Raises:
        RedisUrlError: the URL cannot work.
    """
    address = read_redis_url(url) if isinstance(url, str) else url
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), retries) if retries else Retry(NoBackoff(), 0)
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": retry}
    options: dict[str, Any] = {
        **waits,
        "socket_timeout": timeout_s + block_s,
        "health_check_interval": 0 if block_s else 30,
        "client_name": client_name,
        "db": address.database,
        "username": address.username,
        "password": address.password,
        "redis_connect_func": _greet,
        "max_connections": max_connections,
        "timeout": timeout_s if pool_wait_s is None else pool_wait_s,
        **_placement(address),
    }
    if not address.primary:
        return _Primary.from_pool(_Pool(**options))  # type: ignore[no-untyped-call]  # redis' own
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis' own
        list(address.hosts), sentinel_kwargs=waits | sentinel_login(address)
    )
    primary: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]  # redis' own
        address.primary, _Primary, connection_pool_class=_SentinelPool, **options
    )
    return primary


def run_on_connection(connected: redis.Redis, *commands: Sequence[Any]) -> list[Any]:
    """Run one command, or several in a transaction, on the connection that this client holds.

    A pipeline would take another connection, and a repeated command might get a new one. `WAIT` needs the connection of
    the writes that it counts.

    Args:
        connected: a client that holds one connection, from `Redis.client()`.

    Raises:
        redis.RedisError: after a time-out or a lost connection the commands may have been executed.
    """
    connection: Any = connected.connection
    sent = list(commands) if len(commands) == 1 else [("MULTI",), *commands, ("EXEC",)]
    connection.send_packed_command(connection.pack_commands(sent), check_health=False)
    refused: redis.ResponseError | None = None
    replies: list[Any] = []
    for _ in sent:
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as error:
            refused = refused or error
    results = replies[-1:] if len(commands) == 1 else replies[-1] if replies else []
    if refused is not None:
        raise refused
    for result in results:
        if isinstance(result, redis.ResponseError):
            raise result
    return list(results)


def sentinel_login(address: RedisAddress) -> dict[str, Any]:
    """redis-py's arguments for the login at the sentinels."""
    return {"username": address.sentinel_username, "password": address.sentinel_password}


def _placement(address: RedisAddress) -> dict[str, Any]:
    """redis-py's arguments for the location of the server and the kind of connection."""
    if address.socket_path:
        return {"connection_class": UnixDomainSocketConnection, "path": address.socket_path}
    if address.primary:
        return {"socket_keepalive": True}
    host, port = address.hosts[0]
    placement: dict[str, Any] = {"host": host, "port": port, "socket_keepalive": True}
    return placement if address.tls is None else {**placement, "connection_class": SSLConnection, **address.tls}


def _greet(connection: Any) -> None:
    """Log in, and refuse a cluster node or a sentinel before a command fails there with an unclear error.

    Raises:
        NotOneServer: the greeting of the server names cluster or sentinel mode.
    """
    # redis-py's health check would send a PING first, and call this function again where a login is missing.
    connection.on_connect_check_health(check_health=False)
    mode = _greeting(connection).get(b"mode", b"standalone").decode()
    if mode != "standalone":
        raise NotOneServer(mode)


def _greeting(connection: Any) -> dict[bytes, Any]:
    """The server's reply to HELLO; empty where a proxy does not pass it on.

    redis-py before version 8 logs in without HELLO, so it is sent here.
    """
    greeting = connection.handshake_metadata
    if greeting is None:
        connection.send_command("HELLO", check_health=False)
        with suppress(redis.ResponseError):
            greeting = connection.read_response()
    if isinstance(greeting, list):
        greeting = dict(zip(greeting[::2], greeting[1::2], strict=True))
    return greeting if isinstance(greeting, dict) else {}
