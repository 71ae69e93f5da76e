"""The configuration of a Celery application for one server, or for one shard of a cluster.

`shiwu.broker.redis_url` parses the URL; this module only formats it. kombu takes a URL and a dict of TLS arguments
where redis-py takes keyword arguments, and the result backend takes its own pair of them.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from shiwu.broker.connection import sentinel_login
from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.broker.sharding import cluster_shard

try:
    from celery.app.backends import BACKEND_ALIASES
    from kombu.transport import TRANSPORT_ALIASES
except ModuleNotFoundError as error:
    text = f"shiwu.celery needs {error.name}: run `pip install '.[celery]'` in a clone of shiwu"
    raise ModuleNotFoundError(text, name=error.name) from None

NAME: Final = "shiwu"
"""What `shiwu+cluster://` begins with, by which kombu and Celery find the classes of this package."""
ANSWER_S: Final = 10.0
"""How long a command to a node may take before its connection counts as lost."""


def options(url: str | RedisAddress, *, shard: int = 0) -> dict[str, Any]:
    """The configuration of an application whose messages and results are in this Redis: `app.conf.update(options(…))`.

    With a cluster, all messages and results of the application are in one shard, and its connections follow this shard
    to other nodes. A process that uses the configuration calls this function, which makes the classes known to Celery.

    Args:
        url: as for `shiwu.Client`: `redis://…`, `sentinel://…`, `cluster://…`.
        shard: the index of the shard; 0 without a cluster.

    Raises:
        RedisUrlError: the URL cannot work.
        ValueError: there is no such shard.
    """
    address = read_redis_url(url, may_be_cluster=True) if isinstance(url, str) else url
    if not 0 <= shard < max(1, address.shards):
        raise ValueError(f"expected the index of a shard from 0 to {max(1, address.shards) - 1}, got {shard}")
    more = _shard_options(address, shard) if address.shards else _sentinel_options(address)
    found: dict[str, Any] = {
        "broker_url": celery_url(address),
        "broker_transport_options": dict(more),
        "broker_use_ssl": None if address.tls is None else dict(address.tls),
        "result_backend": celery_url(address),
        "result_backend_transport_options": dict(more),
        "redis_backend_use_ssl": None if address.tls is None else dict(address.tls),
    }
    if not address.shards:
        return found
    TRANSPORT_ALIASES[NAME] = "shiwu.celery.transport:Transport"
    BACKEND_ALIASES[NAME] = "shiwu.celery.backend:ShardBackend"
    found["broker_transport_options"]["socket_timeout"] = ANSWER_S
    return found | {"redis_socket_timeout": ANSWER_S}


def celery_url(address: RedisAddress) -> str:
    """The URL in the form that kombu and Celery read, with every part percent-encoded; of a cluster one node."""
    login = ""
    if address.username or address.password:
        login = f"{_quoted(address.username)}:{_quoted(address.password)}@"
    if address.socket_path:
        return f"redis+socket://{login}{quote(address.socket_path)}?virtual_host={address.database}"
    if address.shards:
        return f"{NAME}+{'cluster' if address.tls is None else 'clusters'}://{login}{_places(address)[0]}/0"
    scheme = "sentinel" if address.primary else "redis" if address.tls is None else "rediss"
    return ";".join(f"{scheme}://{login}{place}/{address.database}" for place in _places(address))


def _shard_options(address: RedisAddress, shard: int) -> dict[str, Any]:
    return {"global_keyprefix": cluster_shard(shard).prefix, "cluster_nodes": ",".join(_places(address))}


def _sentinel_options(address: RedisAddress) -> dict[str, Any]:
    if not address.primary:
        return {}
    return {"master_name": address.primary, "sentinel_kwargs": sentinel_login(address)}


def _places(address: RedisAddress) -> list[str]:
    return [f"[{host}]:{port}" if ":" in host else f"{_quoted(host)}:{port}" for host, port in address.hosts]


def _quoted(text: str | None) -> str:
    return quote(text or "", safe="")
