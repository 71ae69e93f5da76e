"""Redis clients for producers, workers and the sweep, each with a bounded pool and a bound on every wait."""

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
"""Of a client whose caller does not say how many threads use it."""


class _Primary(redis.Redis):
    """A client that leaves a server which became a replica: its next connection resolves the name anew.

    That is how managed services move a primary; sentinels are asked at each new connection.
    """

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        try:
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis' own
        except redis.ReadOnlyError:
            connection.disconnect()
            raise


class _Pool(BlockingConnectionPool):
    """A pool whose callers wait for a connection, for a bounded time, and are told what to change."""

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
    """The same, with connections to the primary that the sentinels name."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Close all connections, or those that no caller uses, which older versions of the pool cannot tell apart."""
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
    """A client whose every wait is bounded. It owns its connections; `close` ends them.

    Args:
        timeout_s: how long one command or one connection attempt may take.
        block_s: how long the longest blocking command of this client asks the server to wait.
        retries: how often a command is tried again at once after a lost connection. A worker takes 0: who knows the
            job's fate decides that there.
        max_connections: how many connections it opens at most; threads beyond that wait for each other. No code may
            ask for a connection while it holds another of the same client, or such threads wait for each other in vain.
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


def call_held(one: redis.Redis, *commands: Sequence[Any]) -> list[Any]:
    """Run commands in one transaction, or one command by itself, on the very connection that this client holds.

    A pipeline of the client would take another connection, and a command that is tried again might get a new one: what
    `WAIT` says is about the writes of its own connection only.

    Args:
        one: what `Redis.client()` gives.

    Raises:
        redis.RedisError: that the commands were not executed is not known after a time-out or a lost connection.
    """
    connection: Any = one.connection
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
    """redis-py's arguments to log in at the sentinels themselves."""
    return {"username": address.sentinel_username, "password": address.sentinel_password}


def _placement(address: RedisAddress) -> dict[str, Any]:
    """redis-py's arguments that say where the server is, and the kind of connection to it."""
    if address.socket_path:
        return {"connection_class": UnixDomainSocketConnection, "path": address.socket_path}
    if address.primary:
        return {"socket_keepalive": True}
    host, port = address.hosts[0]
    placement: dict[str, Any] = {"host": host, "port": port, "socket_keepalive": True}
    return placement if address.tls is None else {**placement, "connection_class": SSLConnection, **address.tls}


def _greet(connection: Any) -> None:
    """Log in, and refuse what is no plain server before a command fails with an error that does not tell the reason.

    Raises:
        NotOneServer: the server says in its greeting that it is part of a cluster, or a sentinel.
    """
    # Without redis-py's check of its health: that sends a PING first, and calls this again where a login is missing.
    connection.on_connect_check_health(check_health=False)
    mode = _greeting(connection).get(b"mode", b"standalone").decode()
    if mode != "standalone":
        raise NotOneServer(mode)


def _greeting(connection: Any) -> dict[bytes, Any]:
    """What the server said of itself; empty where something before it does not pass that on.

    redis-py before version 8 logs in without it, and it has to be asked for.
    """
    told = connection.handshake_metadata
    if told is None:
        connection.send_command("HELLO", check_health=False)
        with suppress(redis.ResponseError):
            told = connection.read_response()
    if isinstance(told, list):
        told = dict(zip(told[::2], told[1::2], strict=True))
    return told if isinstance(told, dict) else {}
