"""Opens the source that an address names."""

from __future__ import annotations

import socket
import threading
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from shiwu.broker.connection import connect
from shiwu.contract import without_logins
from shiwu.errors import RedisUrlError
from shiwu.watch.sources.base import Source, SourceWrong
from shiwu.watch.sources.redis_errors import source_errors
from shiwu.watch.sources.redis_hash import RedisHash
from shiwu.watch.sources.redis_list import RedisList
from shiwu.watch.sources.sqs import Sqs

TIMEOUT_S: Final = 5.0
MAX_BLOCK_S: Final = 2.0
"""The longest wait for a message in Redis, and so about the time until a watcher ends after SIGTERM."""
MAX_NAME_CHARS: Final = 100
REDIS_SCHEMES: Final = ("redis", "rediss", "valkey", "valkeys", "unix", "sentinel")
_FORMATS: Final = {"access": b"list", "namespace": b"hash"}
_EXPECTED: Final = (
    "expected redis://host/0?key=KEY (also rediss://, valkey://, valkeys://, unix://, sentinel://), sqs://QUEUE or "
    "http://ADDRESS:PORT/PATH"
)


def default_watcher() -> str:
    """The name of a watcher without a given one: that of the machine or of the pod."""
    return socket.gethostname()[:MAX_NAME_CHARS] or "watcher"


def open_source(address: str, *, watcher: str, stop: threading.Event) -> Source[Any]:
    """Open a source that the watcher reads; Redis is asked which of MinIO's formats the key has.

    Args:
        stop: ends waits of the source.

    Raises:
        SourceWrong: the address is invalid, or the key holds neither a list nor a hash.
        SourceUnavailable: Redis is unavailable.
    """
    scheme = address.partition("://")[0].lower()
    if scheme == "sqs" and len(address) > len("sqs://"):
        return Sqs(address[len("sqs://") :])
    if scheme in REDIS_SCHEMES:
        return _open_redis(address, watcher=watcher, stop=stop)
    raise SourceWrong(f"{_EXPECTED}, got {without_logins(address)!r:.100}")


def _open_redis(address: str, *, watcher: str, stop: threading.Event) -> Source[Any]:
    url, key, given_format = _split(address)
    try:
        client = connect(url, timeout_s=TIMEOUT_S, block_s=MAX_BLOCK_S, client_name="shiwu-watch")
    except RedisUrlError as error:
        raise SourceWrong(f"{error.code}: {error}") from None
    name = f"{without_logins(url).partition('?')[0]}?key={quote(key)}"
    with source_errors(name):
        found: Any = client.type(key)
    # Redis removes an empty list or hash, so a missing key says nothing: the access format is the likelier one.
    kind = _FORMATS.get(given_format) or (b"hash" if found == b"hash" else b"list")
    if found not in (b"none", kind):
        raise SourceWrong(
            f"{name}: expected a list (format=access) or a hash (format=namespace) of MinIO, got a {found.decode()}"
        )
    if kind == b"list":
        return RedisList(client, key=key, name=name, watcher=watcher)
    return RedisHash(client, key=key, name=name, stop=stop)


def _split(address: str) -> tuple[str, str, str]:
    """The URL for the Redis client, the key of the events, and the format or an empty text."""
    try:
        query = urlsplit(address).query
    except ValueError:
        raise SourceWrong(_EXPECTED) from None
    options = dict(parse_qsl(query, keep_blank_values=True))
    key, given_format = options.pop("key", ""), options.pop("format", "")
    if not key:
        raise SourceWrong("expected the key of the bucket events, as in redis://host/0?key=bucketevents")
    if given_format not in ("", *_FORMATS):
        raise SourceWrong(f"format: expected {' or '.join(_FORMATS)}, got {given_format!r:.40}")
    rest = urlencode(options)
    return address[: len(address) - len(query)].rstrip("?") + (f"?{rest}" if rest else ""), key, given_format
