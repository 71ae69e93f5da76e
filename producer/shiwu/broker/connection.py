"""Opens Redis clients with a limited connection pool and a limit on every wait."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from typing import Any, Final, TypeVar

import redis
from hiredis import pack_command
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.connection import (
    BlockingConnectionPool,
    HiredisRespSerializer,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from shiwu.broker.redis_errors import ConnectionsBusy, NotOneServer
from shiwu.broker.redis_url import RedisAddress, read_redis_url

C = TypeVar("C", bound=redis.Redis)
MAX_CONNECTIONS: Final = 16
"""Default size of a connection pool."""
HEALTH_CHECK_S: Final = 30
"""Seconds without a command after which a connection is checked before the next one."""


class Primary(redis.Redis):
    """A client that disconnects from a server that has become a replica. Its next connection resolves the name again.

    Managed services move a primary by changing its DNS name; sentinels are asked at each new connection.
    """

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Read the reply to one command."""
        try:
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis' own
        except redis.ReadOnlyError:
            connection.disconnect()
            raise


class _CommandPacker(HiredisRespSerializer):
    """redis-py's packer without its loop over all arguments, of which a commit has thousands."""

    def pack(self, *args: Any) -> list[bytes]:
        """The bytes of one command. Its name may be several words, as in "CLIENT SETINFO"."""
        try:
            return [pack_command((*args[0].encode().split(), *args[1:]))]
        except (AttributeError, TypeError):
            # A name as bytes, a memoryview, or a value that no command may have.
            packed: list[bytes] = super().pack(*args)
            return packed


class _Pool(BlockingConnectionPool):
    """A pool whose callers wait for a free connection for a limited time; the error says what to change."""

    def get_connection(self, command_name: str | None = None, *keys: Any, **options: Any) -> Any:
        try:
            return super().get_connection()  # type: ignore[no-untyped-call]  # redis' own
        except redis.ConnectionError as error:
            if not isinstance(error.__context__, Empty):
                raise
            raise busy_error(max_connections=self.max_connections, waited_s=self.timeout) from None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Limits of a client; see `connect`."""

    timeout_s: float
    block_s: float = 0.0
    retries: int = 0
    client_name: str | None = None
    max_connections: int = MAX_CONNECTIONS
    pool_wait_s: float | None = None
    has_pushes: bool = False

    def waits(self) -> dict[str, Any]:
        """redis-py's arguments for time-outs and retries of a command that does not block the server."""
        policy = Retry(ExponentialBackoff(cap=1.0, base=0.05), self.retries) if self.retries else Retry(NoBackoff(), 0)
        return {"socket_timeout": self.timeout_s, "socket_connect_timeout": self.timeout_s, "retry": policy}


def connect(
    url: str | RedisAddress,
    *,
    timeout_s: float,
    block_s: float = 0.0,
    retries: int = 0,
    client_name: str | None = None,
    max_connections: int = MAX_CONNECTIONS,
    pool_wait_s: float | None = None,
    has_pushes: bool = False,
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
        has_pushes: use RESP3, by which the server can notify a connection. Some replies have other types then.

    Raises:
        RedisUrlError: the URL cannot work.
    """
    options = PoolOptions(
        timeout_s=timeout_s,
        block_s=block_s,
        retries=retries,
        client_name=client_name,
        max_connections=max_connections,
        pool_wait_s=pool_wait_s,
        has_pushes=has_pushes,
    )
    return open_client(Primary, read_redis_url(url) if isinstance(url, str) else url, options)


def open_client(client_class: type[C], address: RedisAddress, limits: PoolOptions, **others: Any) -> C:
    """A client of this class; see `connect`.

    Args:
        others: more arguments of redis-py for the pool, which take the place of those that the address gives.
    """
    options: dict[str, Any] = {
        **limits.waits(),
        "socket_timeout": limits.timeout_s + limits.block_s,
        "health_check_interval": 0 if limits.block_s else HEALTH_CHECK_S,
        "client_name": limits.client_name,
        **place_and_login(address, socket_class=UnixDomainSocketConnection, tls_class=SSLConnection),
        "redis_connect_func": _greet,
        "command_packer": _CommandPacker(),
        "max_connections": limits.max_connections,
        "timeout": limits.timeout_s if limits.pool_wait_s is None else limits.pool_wait_s,
        **({"protocol": 3} if limits.has_pushes else {}),
        **others,
    }
    if not address.primary:
        client: C = client_class.from_pool(_Pool(**options))  # type: ignore[assignment, no-untyped-call]  # redis' own
        return client
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis' own
        list(address.hosts), sentinel_kwargs=limits.waits() | sentinel_login(address)
    )
    primary: C = sentinel.master_for(  # type: ignore[no-untyped-call]  # redis' own
        address.primary, client_class, connection_pool_class=_SentinelPool, **options
    )
    return primary


def busy_error(*, max_connections: int, waited_s: float) -> ConnectionsBusy:
    """The error of a pool without a free connection; it says what to change."""
    return ConnectionsBusy(
        f"expected one of {max_connections} connections to Redis to become free within {waited_s:g} s, all stayed in "
        "use; raise max_connections of Client, or use fewer threads or tasks"
    )


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
    sent = as_transaction(commands)
    connection.send_packed_command(connection.pack_commands(sent), check_health=False)
    replies: list[Any] = []
    for _ in sent:
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as error:
            replies.append(error)
    return read_transaction(replies)


def as_transaction(commands: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """One command as it is, or several in a transaction."""
    return list(commands) if len(commands) == 1 else [("MULTI",), *commands, ("EXEC",)]


def read_transaction(replies: Sequence[Any]) -> list[Any]:
    """The results of the commands of `as_transaction`, from the replies to all that was sent.

    Raises:
        redis.ResponseError: the first error among the replies and the results.
    """
    results = replies if len(replies) == 1 else replies[-1] if isinstance(replies[-1], list) else []
    for reply in (*replies, *results):
        if isinstance(reply, redis.ResponseError):
            raise reply
    return list(results)


def sentinel_login(address: RedisAddress) -> dict[str, Any]:
    """redis-py's arguments for the login at the sentinels."""
    return {"username": address.sentinel_username, "password": address.sentinel_password}


def place_and_login(address: RedisAddress, *, socket_class: type, tls_class: type) -> dict[str, Any]:
    """redis-py's arguments for the location of the server, the database and the login.

    Args:
        socket_class: redis-py's connection to a Unix socket; its blocking and its asyncio client have different ones.
        tls_class: redis-py's connection over TLS.
    """
    found: dict[str, Any] = {"db": address.database, "username": address.username, "password": address.password}
    if address.socket_path:
        return found | {"connection_class": socket_class, "path": address.socket_path}
    found["socket_keepalive"] = True
    if address.primary:
        return found
    host, port = address.hosts[0]
    found |= {"host": host, "port": port}
    return found if address.tls is None else {**found, "connection_class": tls_class, **address.tls}


def _greet(connection: Any) -> None:
    """Log in, and refuse a cluster node or a sentinel before a command fails there with an unclear error.

    Raises:
        NotOneServer: the greeting of the server names cluster or sentinel mode.
    """
    check_greeting(greet(connection))


def greet(connection: Any) -> object:
    """Log in on a new connection; the server's reply to HELLO, or None where it refuses HELLO."""
    # redis-py's health check would send a PING first, and call this function again where a login is missing.
    connection.on_connect_check_health(check_health=False)
    # redis-py before version 8 logs in without HELLO, so it is sent here.
    greeting: object = connection.handshake_metadata
    if greeting is None:
        connection.send_command("HELLO", check_health=False)
        # A proxy may not pass it on.
        with suppress(redis.ResponseError):
            greeting = connection.read_response()
    return greeting


def check_greeting(greeting: object) -> None:
    """Check the server's reply to HELLO; None stands for a refusal.

    Raises:
        NotOneServer: the reply names cluster or sentinel mode.
    """
    mode = mode_of(greeting)
    if mode not in {"standalone", ""}:
        raise NotOneServer(mode)


def mode_of(greeting: object) -> str:
    """The mode in the server's reply to HELLO: `standalone`, `cluster` or `sentinel`; empty where it is not known."""
    if isinstance(greeting, list):
        greeting = dict(zip(greeting[::2], greeting[1::2], strict=True))
    return str(greeting.get(b"mode", b"").decode()) if isinstance(greeting, dict) else ""
