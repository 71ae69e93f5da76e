"""Parses the Redis URL for clients, Celery's broker and Celery's result backend.

- `redis://[user:password@]host[:port][/database]`, also `valkey://`: one server.
- `rediss://…`, also `valkeys://`: one server over TLS, with the options `ssl_…`.
- `unix://[user:password@]/path/to/socket[?db=1]`, also `redis+socket:///path?virtual_host=1`: a server on this machine.
- `sentinel://[user:password@]host[:port],host[:port]/name[/database][?sentinel_password=…]`: the primary of that name.
- `cluster://[user:password@]host[:port],host[:port]/[?shards=16]`: a cluster, for callers that use shards.
- `clusters://…`: a cluster over TLS, with the options `ssl_…`.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from shiwu.errors import RedisUrlError

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
DEFAULT_SHARDS: Final = 16
MAX_SHARDS: Final = 256
_PLAIN: Final = frozenset({"redis", "valkey"})
_TLS: Final = frozenset({"rediss", "valkeys"})
_SOCKET: Final = frozenset({"unix", "redis+socket"})
_CLUSTER: Final = frozenset({"cluster", "clusters"})
_FORMS: Final = "redis://, rediss://, valkey://, valkeys://, unix:// or sentinel://"
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]{0,39}")
_OPTION: Final = re.compile(r"[a-z_]{1,40}")
_REFUSED: Final = {
    "socket_timeout": "shiwu sets it: SHIWU_REDIS_TIMEOUT_S of the worker, timeout_s of Client",
    "socket_connect_timeout": "shiwu sets it: SHIWU_REDIS_TIMEOUT_S of the worker, timeout_s of Client",
    "timeout": "shiwu sets it: SHIWU_REDIS_TIMEOUT_S of the worker, timeout_s of Client",
    "max_connections": "shiwu sets it: max_connections of Client",
    "protocol": "shiwu uses the protocol version of its Redis library",
    "decode_responses": "shiwu reads and writes bytes",
    "client_name": "shiwu names its connections itself",
    "health_check_interval": "shiwu sets it itself",
    "retry_on_timeout": "shiwu decides itself what it tries again",
    "socket_keepalive": "shiwu always sends TCP keepalives",
}
"""Option of other libraries → why a URL for shiwu must not have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """Host, database and login of Redis."""

    hosts: tuple[tuple[str, int], ...] = ()
    """Host and port of the server, or of each sentinel or node that is asked first; empty for a Unix socket."""
    socket_path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, Any] | None = field(default=None, repr=False)
    """redis-py's arguments `ssl_…`, `ssl_cert_reqs` always among them; None without TLS."""
    primary: str = ""
    """The name of the primary at the sentinels; empty without sentinels."""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    shards: int = 0
    """Number of shards in a cluster; 0 without a cluster."""


def read_redis_url(url: str, *, may_be_cluster: bool = False) -> RedisAddress:
    """Parse a Redis URL.

    Args:
        may_be_cluster: whether the caller can use the shards of a cluster.

    Raises:
        RedisUrlError: the text says what was expected. It does not quote the URL, which may contain a password.
    """
    url = url.strip()
    if not url:
        raise RedisUrlError(f"expected {_FORMS}, got an empty text")
    if any(ord(character) < 0x20 for character in url):
        raise RedisUrlError("expected a URL in one line, got control characters in it")
    if "://" not in url:
        raise RedisUrlError(f"expected {_FORMS}, got a text without ://")
    scheme = url.partition("://")[0].lower()
    if scheme in _CLUSTER and not may_be_cluster:
        raise RedisUrlError(f"expected {_FORMS}, got {scheme}://, which this program cannot use yet; give one server")
    if scheme not in _PLAIN | _TLS | _SOCKET | _CLUSTER | {"sentinel"}:
        raise RedisUrlError(f"expected {_FORMS}, got {scheme if _SCHEME.fullmatch(scheme) else '…'}://")
    try:
        # `redis+socket` and the like are no schemes to urlsplit in every Python; the rest of the URL is read alike.
        parts = urlsplit("redis" + url[len(scheme) :])
    except ValueError:
        raise RedisUrlError("expected a host as name, IPv4 address or [IPv6 address]") from None
    if parts.fragment or "#" in url:
        raise RedisUrlError("expected no #; in a password write %23 for #, %2F for /, %3F for ?, %40 for @, %25 for %")
    options = _Options(parts.query)
    if scheme in _SOCKET:
        address = _read_socket(parts, options)
    elif scheme == "sentinel":
        address = _read_sentinel(parts, options)
    elif scheme in _CLUSTER:
        address = _read_cluster(parts, options, has_tls=scheme == "clusters")
    else:
        address = _read_server(parts, options, has_tls=scheme in _TLS)
    options.refuse_rest()
    return address


class _Options:
    """The query of a URL. `take` removes an option, and `refuse_rest` refuses what is left."""

    def __init__(self, query: str) -> None:
        pairs = parse_qsl(query, keep_blank_values=True)
        self._left = dict(pairs)
        if len(self._left) < len(pairs):
            raise RedisUrlError("expected every option of the query once")

    def take(self, *names: str) -> str | None:
        """The value of an option with one or more names; None where it is missing or empty."""
        found = [self._left.pop(name) for name in names if name in self._left]
        if len(set(found)) > 1:
            raise RedisUrlError(f"expected one of {' and '.join(names)}, got both")
        return found[0] or None if found else None

    def refuse_rest(self) -> None:
        for name in self._left:
            if name in _TLS_OPTIONS:
                raise RedisUrlError(
                    f"{name}: expected rediss:// or clusters:// with options of TLS, got a URL without TLS"
                )
            reason = _REFUSED.get(name, "shiwu does not know this option of the query")
            # A password with `?` would be read as the name of an option.
            shown = name if _OPTION.fullmatch(name) else "a part after `?`"
            raise RedisUrlError(f"{shown}: {reason}; leave it out")


def _read_server(parts: SplitResult, options: _Options, *, has_tls: bool) -> RedisAddress:
    username, password, hosts = _login(parts.netloc)
    if "," in hosts or ";" in hosts:
        raise RedisUrlError("expected one host; for several sentinels use sentinel://host,host/name")
    return RedisAddress(
        hosts=(_host(hosts, default_port=REDIS_PORT),),
        database=_database(parts.path.strip("/"), options.take("db", "virtual_host")),
        username=username,
        password=password,
        tls=_read_tls(options) if has_tls else None,
    )


def _read_socket(parts: SplitResult, options: _Options) -> RedisAddress:
    username, password, hosts = _login(parts.netloc)
    if hosts or not parts.path.strip("/"):
        raise RedisUrlError("expected unix:///path/to/socket, perhaps with ?db=NUMBER")
    return RedisAddress(
        socket_path=unquote(parts.path),
        database=_database(options.take("db", "virtual_host")),
        username=username,
        password=password,
    )


def _read_sentinel(parts: SplitResult, options: _Options) -> RedisAddress:
    username, password, hosts = _login(parts.netloc)
    path = parts.path.strip("/").split("/")
    if not hosts or not path[0] or len(path) > 2:
        raise RedisUrlError("expected sentinel://[user:password@]host:port,host:port/master-name[/database]")
    return RedisAddress(
        hosts=tuple(_host(host, default_port=SENTINEL_PORT) for host in hosts.split(",")),
        primary=unquote(path[0]),
        database=_database(*path[1:], options.take("db")),
        username=username,
        password=password,
        sentinel_username=options.take("sentinel_username"),
        sentinel_password=options.take("sentinel_password"),
    )


def _read_cluster(parts: SplitResult, options: _Options, *, has_tls: bool) -> RedisAddress:
    username, password, hosts = _login(parts.netloc)
    if not hosts or not all(hosts.split(",")):
        raise RedisUrlError("expected cluster://[user:password@]host:port,host:port/?shards=16 with a node at least")
    if _database(parts.path.strip("/"), options.take("db")):
        raise RedisUrlError("expected database 0, which is the only one of a cluster")
    return RedisAddress(
        hosts=tuple(_host(host, default_port=REDIS_PORT) for host in hosts.split(",")),
        username=username,
        password=password,
        tls=_read_tls(options) if has_tls else None,
        shards=_shards(options.take("shards")),
    )


def _shards(text: str | None) -> int:
    if text is None:
        return DEFAULT_SHARDS
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MAX_SHARDS):
        raise RedisUrlError(f"shards: expected a number from 1 to {MAX_SHARDS}, as in ?shards={DEFAULT_SHARDS}")
    return int(text)


def _login(netloc: str) -> tuple[str | None, str | None, str]:
    """User name, password, and the hosts after them."""
    login, _, hosts = netloc.rpartition("@")
    username, _, password = login.partition(":")
    return unquote(username) or None, unquote(password) or None, hosts


def _host(text: str, *, default_port: int) -> tuple[str, int]:
    host, separator, port = text.rpartition(":") if ":" in text and not text.endswith("]") else (text, "", "")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    if (separator and not port.isdecimal()) or int(port or 0) > 65535 or (":" in host and not is_ipv6):
        raise RedisUrlError("expected host or host:port with a port up to 65535, and an IPv6 address in [brackets]")
    return unquote(host.strip("[]")) or "localhost", int(port or default_port)


def _database(*texts: str | None) -> int:
    """The number of the database, which the path, the query or both may give."""
    numbers = {unquote(text) for text in texts if text}
    if len(numbers) > 1:
        raise RedisUrlError("expected one number of a database, got one in the path and another in the query")
    text = numbers.pop() if numbers else "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise RedisUrlError("expected the number of a database after the host, as in redis://host/0")
    return int(text)


def _file(name: str, text: str) -> str:
    if not Path(text).exists():
        raise RedisUrlError(f"{name}: expected a file that exists, got {text!r:.200}")
    return text


def _one_of(choices: Mapping[str, Any]) -> Callable[[str, str], Any]:
    def read(name: str, text: str) -> Any:
        if text.lower() not in choices:
            raise RedisUrlError(f"{name}: expected one of {', '.join(choices)}, got {text!r:.40}")
        return choices[text.lower()]

    return read


def _text(_: str, text: str) -> str:
    return text


_CERT_REQS: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_TLS_OPTIONS: Final[Mapping[str, Callable[[str, str], Any]]] = {
    "ssl_cert_reqs": _one_of(_CERT_REQS | {f"cert_{name}": value for name, value in _CERT_REQS.items()}),
    "ssl_check_hostname": _one_of({"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}),
    "ssl_ca_certs": _file,
    "ssl_ca_path": _file,
    "ssl_ca_data": _text,
    "ssl_certfile": _file,
    "ssl_keyfile": _file,
    "ssl_password": _text,
    "ssl_min_version": _one_of(_VERSIONS | {str(int(version)): version for version in _VERSIONS.values()}),
    "ssl_ciphers": _text,
}


def _read_tls(options: _Options) -> Mapping[str, Any]:
    """redis-py's arguments for TLS. The server's certificate is checked unless the URL disables it."""
    found: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    for name, read in _TLS_OPTIONS.items():
        if (text := options.take(name)) is not None:
            found[name] = read(name, text)
    return found
