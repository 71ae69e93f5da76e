"""Celery's settings for the broker and the result backend of the worker: `shiwu.celery` with limits of its own."""

from __future__ import annotations

from typing import Any, Final

from shiwu.broker.redis_url import RedisAddress
from shiwu.broker.sharding import cluster_shard
from shiwu.celery import options

BROKER_CONNECTIONS: Final = 10
"""A channel uses one to wait for messages, one for the control channel, and one to publish."""
BACKEND_CONNECTIONS: Final = 10
"""One thread sends callbacks; the counter of a chord and its results are read one after another."""
HEALTH_CHECK_S: Final = 30


def broker_config(address: RedisAddress, *, timeout_s: float, shard: int = 0) -> dict[str, Any]:
    """Return Celery's settings for the broker; on a cluster for that in a shard."""
    found = options(address, shard=shard)
    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
        "max_connections": BROKER_CONNECTIONS,
        "priority_steps": [0],
    }
    return {
        "broker_url": found["broker_url"],
        "broker_transport_options": found["broker_transport_options"] | limits,
        "broker_use_ssl": found["broker_use_ssl"],
    }


def admin_config(address: RedisAddress, *, timeout_s: float) -> dict[str, Any]:
    """Return Celery's settings for the broker of the worker's own consumer.

    On a cluster it receives the broadcasts of all shards; its queue, its replies and its events are in shard 0.
    """
    found = broker_config(address, timeout_s=timeout_s)
    if address.shards:
        prefixes = [cluster_shard(index).prefix for index in range(address.shards)]
        found["broker_transport_options"]["listen_prefixes"] = prefixes
    return found


def backend_config(address: RedisAddress, *, timeout_s: float, shard: int = 0) -> dict[str, Any]:
    """Return Celery's settings for the result backend; on a cluster for that in a shard."""
    found = options(address, shard=shard)
    names = ("result_backend", "result_backend_transport_options", "redis_backend_use_ssl")
    return {name: found[name] for name in names} | {
        "redis_socket_timeout": timeout_s,
        "redis_socket_connect_timeout": timeout_s,
        # Connections over a Unix socket do not take this argument.
        "redis_socket_keepalive": not address.socket_path,
        "redis_backend_health_check_interval": HEALTH_CHECK_S,
        "redis_max_connections": BACKEND_CONNECTIONS,
    }
