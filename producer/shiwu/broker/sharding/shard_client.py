"""The client of one shard: the caller names keys as on one server, and the connection adds the prefix of the shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.client import PubSub

from shiwu.broker.connection import Primary
from shiwu.broker.sharding.command_keys import as_word, with_prefix
from shiwu.broker.sharding.reply_keys import KeyReader, take_prefix_from_replies
from shiwu.broker.sharding.shards import ONE_SERVER, Shard

if TYPE_CHECKING:
    _Base = redis.Connection
else:
    _Base = object


_SUBSCRIPTIONS: Final = frozenset({"SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE"})


class _Prefixing(_Base):
    """Part of a connection class: changes all commands that are sent, also by pipelines and subscriptions."""

    def __init__(self, *, shard: Shard, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]  # redis' own
        self.shard = shard

    def send_command(self, *args: Any, **options: Any) -> None:
        """Send one command."""
        super().send_command(*self._with_prefix(args), **options)  # type: ignore[no-untyped-call]  # redis' own

    def pack_command(self, *args: Any) -> Any:
        """The bytes of one command."""
        return super().pack_command(*self._with_prefix(args))  # type: ignore[no-untyped-call]  # redis' own

    def pack_commands(self, commands: Iterable[Any]) -> Any:
        """The bytes of several commands."""
        return super().pack_commands(map(self._with_prefix, commands))  # type: ignore[no-untyped-call]  # redis' own

    def _with_prefix(self, command: Sequence[Any]) -> tuple[Any, ...]:
        return with_prefix(self.shard.prefix, command)


class MissingPrefix(_Prefixing):
    """Part of a connection class, for libraries that put the prefix of a shard on some of their keys.

    Adds the prefix to the others. Keys in replies keep it. Names in subscriptions stay as they are: they may be those
    of other shards, because each node of a cluster passes on the messages of all.
    """

    def _with_prefix(self, command: Sequence[Any]) -> tuple[Any, ...]:
        if as_word(command[0]) in _SUBSCRIPTIONS:
            return tuple(command)
        return with_prefix(self.shard.prefix, command, is_partly_done=True)


class KeyPrefix(_Prefixing):
    """Part of a connection class: adds the prefix of a shard to all that is sent.

    Notifications of channels and of changed keys come without the prefix. Replies are read by the client, which knows
    the commands that they belong to.
    """

    def __init__(self, *, shard: Shard, **options: Any) -> None:
        super().__init__(shard=shard, **options)
        self._reader = KeyReader(shard.prefix)

    def read_response(self, *args: Any, push_request: bool | None = False, **options: Any) -> Any:
        """The next reply, or with `push_request` the next notification."""
        reply = super().read_response(*args, push_request=push_request, **options)
        return self._reader.push(reply) if push_request else reply


@cache
def prefixed(connection_class: type) -> type:
    """A connection class of redis-py with `KeyPrefix`."""
    return type(f"Shard{connection_class.__name__}", (KeyPrefix, connection_class), {})


class ShardPubSub(PubSub):
    """Subscriptions to the channels of a shard, which end with an error when its slot moves to another node.

    Messages come from `SPUBLISH` in this shard, as its scripts send them, and not from `PUBLISH`.
    """

    def subscribe(self, *args: Any, **handlers: Any) -> Any:
        """Subscribe to these channels of the shard."""
        return self.ssubscribe(*args, **handlers)

    def unsubscribe(self, *args: Any) -> Any:
        """End subscriptions to these channels of the shard."""
        return self.sunsubscribe(*args)  # type: ignore[no-untyped-call]  # redis' own

    def handle_message(self, response: Any, ignore_subscribe_messages: bool = False) -> Any:
        """Make a message of what the server sent.

        Raises:
            redis.ConnectionError: the server ended a subscription; the next call connects and subscribes again.
        """
        is_end = response is not None and response[0] in {b"sunsubscribe", "sunsubscribe"}
        if is_end and response[1] not in self.pending_unsubscribe_shard_channels:
            connection: Any = self.connection
            connection.disconnect()
            raise redis.ConnectionError("the node ended a subscription: its slot has moved; subscribe again")
        return super().handle_message(response, ignore_subscribe_messages)  # type: ignore[no-untyped-call]  # redis' own


class ShardRedis(Primary):
    """A client of one shard; with a prefix, all of its keys and channels have it, in Redis and nowhere else.

    Its pipelines, scripts, locks and subscriptions behave as those of `redis.Redis`. Scripts must declare their keys,
    and keys that a script returns or stores have the prefix.

    Args:
        connection_pool: `shard` among its arguments for connections names the shard; without it this is a plain client.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        pool: Any = self.connection_pool
        self.shard: Shard = pool.connection_kwargs.get("shard", ONE_SERVER)
        if not self.shard.prefix:
            return
        if not issubclass(pool.connection_class, KeyPrefix):
            pool.connection_class = prefixed(pool.connection_class)
        take_prefix_from_replies(self.response_callbacks, KeyReader(self.shard.prefix))

    def pubsub(self, **options: Any) -> PubSub:
        """A new object for subscriptions."""
        subscriptions = ShardPubSub if self.shard.prefix else PubSub
        return subscriptions(self.connection_pool, **options)
