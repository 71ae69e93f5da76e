"""What the transport and the result backend share: redis-py's arguments for connections that follow a shard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from redis.backoff import NoBackoff
from redis.retry import Retry

from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.broker.sharding import ClusterMap, open_map, shard_with_prefix

CONNECT_S: Final = 5.0
"""How long a connection attempt, or the search for the node of a shard, may take."""
MAX_MAPS: Final = 16
"""Maps of clusters and logins that a process keeps."""


def follow_shard(arguments: Mapping[str, Any], *, nodes: str, prefix: str) -> dict[str, Any]:
    """The arguments for connections that go to the primary of a shard, from those of a connection to one server.

    Args:
        nodes: `host:port` of nodes that are asked first, with commas between them.
        prefix: the prefix of the shard, which names its slot.

    Raises:
        ValueError: the options of the application are not those of `shiwu.celery.options`.
    """
    if not nodes:
        raise ValueError("expected the options of shiwu.celery.options, got some without cluster_nodes")
    found = {name: value for name, value in arguments.items() if name not in {"host", "port"}}
    found["socket_connect_timeout"] = found.get("socket_connect_timeout") or CONNECT_S
    tls = tuple(sorted((name, value) for name, value in found.items() if name.startswith("ssl_")))
    return found | {
        "shard": shard_with_prefix(prefix),
        "cluster_map": _map_of(nodes, found.get("username"), found.get("password"), tls),
    }


def once_more() -> Retry:
    """Repeats a command once, immediately: a node that lost the slot refuses one command of each connection."""
    return Retry(NoBackoff(), 1)


@lru_cache(maxsize=MAX_MAPS)
def _map_of(nodes: str, username: str | None, password: str | None, tls: tuple[tuple[str, Any], ...]) -> ClusterMap:
    """One map for all connections of a process, which is asked for once a second at most."""
    hosts = read_redis_url(f"cluster://{nodes}", may_be_cluster=True).hosts
    address = RedisAddress(hosts=hosts, username=username, password=password, tls=dict(tls) or None)
    return open_map(address, timeout_s=CONNECT_S)
