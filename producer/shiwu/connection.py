"""One way to Redis for producers, workers and the sweep: a plain server, TLS, or the primary that sentinels name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

SENTINEL_PORT: Final = 26379


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """`sentinel://[user:password@]host:port,host:port/name[/database][?sentinel_password=…]`, read.

    User and password are the Redis servers'; sentinels have a password of their own.
    """

    hosts: tuple[tuple[str, int], ...]
    name: str
    database: int
    username: str | None
    password: str | None
    sentinel_password: str | None


def read_sentinel_url(url: str) -> SentinelAddress:
    """Read a sentinel URL.

    Raises:
        ValueError: says what form was expected. The URL is not in the text, for it may hold a password.
    """
    expected = "expected sentinel://[user:password@]host:port,host:port/master-name[/database]"
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    path = parts.path.strip("/").split("/")
    if parts.scheme != "sentinel" or not hosts or not path[0] or len(path) > 2:
        raise ValueError(expected)
    try:
        database = int(path[1]) if len(path) == 2 else 0
        addresses = tuple(_address(host) for host in hosts.split(","))
    except ValueError:
        raise ValueError(expected) from None
    own = parse_qs(parts.query).get("sentinel_password")
    return SentinelAddress(
        hosts=addresses,
        name=path[0],
        database=database,
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=own[0] if own else None,
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", SENTINEL_PORT)
    if not host:
        raise ValueError("expected a host")
    return host.strip("[]"), int(port)


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


def connect(
    url: str, *, timeout_s: float, block_s: float = 0.0, retries: int = 0, client_name: str | None = None
) -> redis.Redis:
    """A client whose every wait is bounded.

    Args:
        block_s: how long the longest blocking command of this client asks the server to wait.
        retries: how often a command is tried again at once after a lost connection. A worker takes 0: who knows the
            job's fate decides that there.
    """
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), retries) if retries else Retry(NoBackoff(), 0)
    options: dict[str, Any] = {
        "socket_timeout": timeout_s + block_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 0 if block_s else 30,
        "retry": retry,
        "client_name": client_name,
    }
    if not url.startswith("sentinel:"):
        return _Primary.from_url(url, **options)
    address = read_sentinel_url(url)
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": retry}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis' own
        list(address.hosts), sentinel_kwargs=waits | {"password": address.sentinel_password}
    )
    primary: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]  # redis' own
        address.name, _Primary, **options, db=address.database, username=address.username, password=address.password
    )
    return primary
