"""kombu's transport for Redis in one shard of a cluster, as `shiwu.celery.options` configures it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from kombu.transport import redis as kombu_redis

from shiwu.broker.sharding import CelerySlotConnection, CelerySlotSSLConnection
from shiwu.celery.slots import follow_shard, once_more

_PREFIX: Final = re.compile(rb"\{[^{}]*\}:")


class Subscriptions(kombu_redis.PrefixedRedisPubSub):  # type: ignore[misc]  # kombu has no types
    """Subscriptions to the broadcasts of several shards over one connection, as each node of a cluster passes all on.

    Args:
        listen_prefixes: the prefixes of the shards.
    """

    def __init__(self, *args: Any, listen_prefixes: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefixes = listen_prefixes

    def _prefix_args(self, args: Sequence[Any]) -> list[Any]:
        if args[0] not in self.PUBSUB_COMMANDS:
            return list(args)
        return [args[0], *(f"{prefix}{name}" for prefix in self._prefixes for name in args[1:])]

    def parse_response(self, *args: Any, **options: Any) -> Any:
        """The next message, with its channel and pattern as in any of the shards."""
        found = super(kombu_redis.PrefixedRedisPubSub, self).parse_response(*args, **options)
        if not isinstance(found, list | tuple) or len(found) < 3:
            return found
        return [found[0], *(_PREFIX.sub(b"", name, count=1) for name in found[1:-1]), found[-1]]


class Client(kombu_redis.PrefixedStrictRedis):  # type: ignore[misc]  # kombu has no types
    """A client whose subscriptions may be those of several shards."""

    def __init__(self, *args: Any, listen_prefixes: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._listen_prefixes = listen_prefixes

    def pubsub(self, **options: Any) -> Subscriptions:
        """A new object for subscriptions."""
        return Subscriptions(
            self.connection_pool,
            listen_prefixes=self._listen_prefixes or (self.global_keyprefix,),
            global_keyprefix=self.global_keyprefix,
            **options,
        )


class Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel whose connections go to the primary of the shard. A refused command counts as a lost connection."""

    from_transport_options = (*kombu_redis.Channel.from_transport_options, "cluster_nodes", "listen_prefixes")
    connection_class = CelerySlotConnection
    connection_class_ssl = CelerySlotSSLConnection
    cluster_nodes = ""
    listen_prefixes: Sequence[str] = ()
    """The shards whose broadcasts this channel receives; empty for its own. It sends to its own only."""

    def _connparams(self, asynchronous: Any = False) -> dict[str, Any]:
        arguments = super()._connparams(asynchronous=asynchronous)
        found = follow_shard(arguments, nodes=self.cluster_nodes, prefix=self.global_keyprefix)
        # kombu itself reads from its asynchronous connections, and connects them again by its own means.
        return found if asynchronous else found | {"retry": once_more()}

    def _get_client(self) -> Any:
        return partial(Client, global_keyprefix=self.global_keyprefix, listen_prefixes=self.listen_prefixes)


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu has no types
    """kombu finds it as `shiwu+cluster://` and `shiwu+clusters://`."""

    Channel = Channel
