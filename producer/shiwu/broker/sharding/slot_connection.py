"""Connections that always go to the node that has the slot of their shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.retry import Retry

from shiwu.broker.connection import greet, mode_of
from shiwu.broker.redis_errors import NotACluster
from shiwu.broker.sharding.cluster_map import AskNode, ClusterMap, Node
from shiwu.broker.sharding.shard_client import KeyPrefix, MissingPrefix
from shiwu.broker.sharding.shards import Shard

if TYPE_CHECKING:
    _Base = Connection
else:
    _Base = object

_ELSEWHERE: Final = (
    exceptions.AskError,  # also MOVED
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.TryAgainError,
)


class _ToSlot(_Base):
    """Part of a connection class: connects to the primary of a slot, and leaves a node that does not have it."""

    shard: Any

    def __init__(self, *, cluster_map: ClusterMap, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]  # redis' own
        self._map = cluster_map

    # redis-py calls this and not always `connect`.
    def _connect(self) -> Any:
        self.host, self.port = self._map.primary_of(self.shard.slot)
        try:
            return super()._connect()  # type: ignore[no-untyped-call]  # redis' own
        except OSError:
            self._map.distrust()
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        """The next reply.

        Raises:
            redis.ConnectionError: also where the node refuses the slot. The next command goes to its present node.
        """
        try:
            return super().read_response(*args, **options)
        except redis.RedisError as error:
            if (moved := leave_node(error, self._map, shard=self.shard, node=(self.host, self.port))) is None:
                raise
            self.disconnect()  # type: ignore[no-untyped-call]  # redis' own
            raise moved from error


class SlotConnection(KeyPrefix, _ToSlot, Connection):
    """A connection to the primary of a shard."""


class SlotSSLConnection(KeyPrefix, _ToSlot, SSLConnection):
    """As `SlotConnection`, over TLS."""


class CelerySlotConnection(MissingPrefix, _ToSlot, Connection):
    """A connection to the primary of a shard for Celery and kombu, which put the prefix on most keys."""


class CelerySlotSSLConnection(MissingPrefix, _ToSlot, SSLConnection):
    """As `CelerySlotConnection`, over TLS."""


def leave_node(
    error: redis.RedisError, cluster_map: ClusterMap, *, shard: Shard, node: Node
) -> redis.ConnectionError | None:
    """The error of a connection whose node refuses the slot, which the map remembers; None for any other error."""
    if not isinstance(error, _ELSEWHERE):
        return None
    if isinstance(error, exceptions.MovedError):
        cluster_map.has_moved(int(error.slot_id), (error.host or node[0], int(error.port)))
    else:
        cluster_map.distrust()
    where = f"{node[0]}:{node[1]}"
    return redis.ConnectionError(f"{where} refuses slot {shard.slot}: {type(error).__name__} {error}"[:300])


def greet_node(connection: Any) -> None:
    """Log in, and refuse a server without cluster mode.

    Raises:
        NotACluster: the greeting of the server names another mode.
    """
    check_node(greet(connection))


def check_node(greeting: object) -> None:
    """Check the server's reply to HELLO; None stands for a refusal.

    Raises:
        NotACluster: the reply names another mode.
    """
    mode = mode_of(greeting)
    if mode not in {"cluster", ""}:
        raise NotACluster(mode)


def open_node_with(login: Mapping[str, Any], *, connection_class: type, **others: Any) -> Callable[[Node, float], Any]:
    """A function that makes a connection to one node, which is not connected yet.

    Args:
        login: redis-py's arguments for user, password and TLS.
        connection_class: redis-py's connection, with or without TLS.
        others: more of redis-py's arguments.
    """

    def open_node(node: Node, timeout_s: float) -> Any:
        return connection_class(
            **login,
            **others,
            host=node[0],
            port=node[1],
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=greet_node,
        )

    return open_node


def ask_with(login: Mapping[str, Any], *, connection_class: type) -> AskNode:
    """A function that asks one node for its map on a connection of its own.

    Args:
        login: redis-py's arguments for user, password and TLS.
        connection_class: redis-py's connection, with or without TLS.
    """

    open_node = open_node_with(login, connection_class=connection_class)

    def ask(node: Node, timeout_s: float) -> Any:
        connection = open_node(node, timeout_s)
        try:
            connection.connect()
            connection.send_command("CLUSTER", "SLOTS", check_health=False)
            return connection.read_response()
        finally:
            connection.disconnect()

    return ask
