"""Translates the Redis address into Celery's settings for the broker (kombu) and the result backend.

`shiwu.broker.redis_url` parses the URL; this module only formats it. kombu takes a URL and a dict of TLS arguments
where redis-py takes keyword arguments, and the result backend takes its own pair of them.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from shiwu.broker.connection import sentinel_login
from shiwu.broker.redis_url import RedisAddress

BROKER_CONNECTIONS: Final = 10
"""A channel uses one to wait for messages, one for the control channel, and one to publish."""
BACKEND_CONNECTIONS: Final = 10
"""One thread sends callbacks; the counter of a chord and its results are read one after another."""
HEALTH_CHECK_S: Final = 30


def broker_config(address: RedisAddress, *, timeout_s: float) -> dict[str, Any]:
    """Return Celery's settings for the broker; on a cluster, which kombu cannot use, one without a network."""
    if address.shards:
        return {"broker_url": "memory://localhost//"}
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
        "max_connections": BROKER_CONNECTIONS,
        "priority_steps": [0],
    }
    return {
        "broker_url": celery_url(address),
        "broker_transport_options": options | _sentinels(address),
        "broker_use_ssl": None if address.tls is None else dict(address.tls),
    }


def backend_config(address: RedisAddress, *, timeout_s: float) -> dict[str, Any]:
    """Return Celery's settings for the result backend."""
    return {
        "result_backend": celery_url(address),
        "result_backend_transport_options": _sentinels(address),
        "redis_backend_use_ssl": None if address.tls is None else dict(address.tls),
        "redis_socket_timeout": timeout_s,
        "redis_socket_connect_timeout": timeout_s,
        # Connections over a Unix socket do not take this argument.
        "redis_socket_keepalive": not address.socket_path,
        "redis_backend_health_check_interval": HEALTH_CHECK_S,
        "redis_max_connections": BACKEND_CONNECTIONS,
    }


def celery_url(address: RedisAddress) -> str:
    """Return the URL in the form that kombu and Celery read, with every part percent-encoded."""
    login = ""
    if address.username or address.password:
        login = f"{_quoted(address.username)}:{_quoted(address.password)}@"
    if address.socket_path:
        return f"redis+socket://{login}{quote(address.socket_path)}?virtual_host={address.database}"
    scheme = "sentinel" if address.primary else "redis" if address.tls is None else "rediss"
    hosts = [f"[{host}]:{port}" if ":" in host else f"{_quoted(host)}:{port}" for host, port in address.hosts]
    return ";".join(f"{scheme}://{login}{host}/{address.database}" for host in hosts)


def _sentinels(address: RedisAddress) -> dict[str, Any]:
    if not address.primary:
        return {}
    return {"master_name": address.primary, "sentinel_kwargs": sentinel_login(address)}


def _quoted(text: str | None) -> str:
    return quote(text or "", safe="")
