"""HTTP connections that reach only what the address guard allows, and end at one deadline whatever the server does.

A time-out of urllib3 limits one wait for data. A server that sends a byte now and then never exceeds it, so the sockets
here know the deadline of the whole request, and how many bytes of headers may still come.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import Timeout, make_headers, parse_url
from urllib3.util.ssl_ import create_urllib3_context

from shiwu.network.address_guard import AddressGuard, Resolve, resolve_by_system
from shiwu.network.address_rules import AddressRules
from shiwu.network.http_replies import FinalReply

MAX_HEADER_BYTES: Final = 64 * 1024
"""Of one reply with its status line, and of interim replies (1xx) before it; Python limits headers to 100."""
LOOKUPS_PER_THREAD: Final = 2
MAX_IDLE_HOSTS: Final = 8
"""Hosts with idle connections, which are open files; producers name the hosts, so their number is limited."""


class _Deadline(threading.local):
    """The deadline of the request of this thread, in seconds of the monotonic clock."""

    at_s = math.inf


_deadline: Final = _Deadline()


def _limit_timeout(sock: socket.socket) -> None:
    left_s = _deadline.at_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the time for the whole request is over")
    timeout_s = sock.gettimeout()
    if timeout_s is None or timeout_s > left_s:
        sock.settimeout(left_s)


def _count_header_bytes(left: int | None, count: int) -> int | None:
    if left is not None and count > left:
        raise OSError(f"expected at most {MAX_HEADER_BYTES} bytes of headers, got more")
    return None if left is None else left - count


class _Socket(socket.socket):
    """A socket that keeps to the deadline and to the limit of header bytes."""

    header_bytes_left: int | None = None

    def recv_into(self, *args: Any, **options: Any) -> int:
        _limit_timeout(self)
        count = super().recv_into(*args, **options)
        self.header_bytes_left = _count_header_bytes(self.header_bytes_left, count)
        return count

    def send(self, *args: Any, **options: Any) -> int:
        _limit_timeout(self)
        return super().send(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        _limit_timeout(self)
        super().sendall(*args, **options)


class _TlsSocket(_Socket, ssl.SSLSocket):
    """A `_Socket` inside TLS; `super()` in `_Socket` is then the class of `ssl`."""


class HttpClient:
    """Sends requests and follows no redirect by itself. Thread-safe.

    Args:
        access: the operator's rules.
        threads: idle connections kept for each host.
        user_agent: the sender that requests name.
        accept: the media types that requests ask for.
        resolve: name look-up, called once for each connection.
    """

    def __init__(
        self,
        access: AddressRules,
        *,
        threads: int,
        connect_timeout_s: float,
        read_timeout_s: float,
        user_agent: str = "shiwu",
        accept: str = "*/*",
        resolve: Resolve = resolve_by_system,
    ) -> None:
        # Its warnings would print whole URLs with their queries.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)
        self._guard = AddressGuard(access, resolve=resolve, lookups=LOOKUPS_PER_THREAD * threads, make_socket=_Socket)
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._headers = {"Accept-Encoding": "identity", "Accept": accept, "User-Agent": user_agent}
        self._has_proxy = access.proxy_url is not None
        self._manager = _manager(access.proxy_url, threads=threads)
        self._manager.pool_classes_by_scheme = _pool_classes(self._guard)

    def open(self, url: str, *, deadline_s: float, etag: str | None = None) -> urllib3.BaseHTTPResponse:
        """Send one GET; as `send`. With `etag` the reply may be 304 if the file is still the one with this ETag."""
        headers = None if etag is None else {"If-None-Match": etag}
        return self.send("GET", url, headers=headers, deadline_s=deadline_s)

    def send(
        self,
        method: str,
        url: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float,
    ) -> urllib3.BaseHTTPResponse:
        """Send one request. The same thread must read the body of the reply, which is not read yet.

        Args:
            headers: in addition to those of all requests.
            deadline_s: time of the monotonic clock by which everything has ended, including the body of the reply.

        Raises:
            AddressRefused: when the rules forbid the address.
            UnknownHost: when there is no such name.
            urllib3.exceptions.HTTPError: for a failed connection or an unreadable reply.
            OSError: for a failed connection.
        """
        _deadline.at_s = deadline_s
        if self._has_proxy:
            parts = parse_url(url)
            self._guard.check_name(parts.host or "", parts.port or (443 if parts.scheme == "https" else 80))
        left_s = max(0.001, deadline_s - time.monotonic())
        return self._manager.request(
            method,
            url,
            body=body,
            preload_content=False,
            decode_content=False,
            redirect=False,
            retries=False,
            timeout=Timeout(
                connect=min(self._connect_timeout_s, left_s),
                read=min(self._read_timeout_s, left_s),
            ),
            headers={**self._headers, **(headers or {})},
        )


def _manager(proxy_url: str | None, *, threads: int) -> urllib3.PoolManager:
    options: dict[str, Any] = {"num_pools": MAX_IDLE_HOSTS, "maxsize": threads, "block": False}
    if proxy_url is None:
        # Proxies from environment variables are ignored.
        return urllib3.PoolManager(**options)
    auth = parse_url(proxy_url).auth
    return urllib3.ProxyManager(
        proxy_url, proxy_headers=make_headers(proxy_basic_auth=auth) if auth else None, **options
    )


def _pool_classes(guard: AddressGuard) -> dict[str, Any]:
    class Plain(HTTPConnection):
        response_class = FinalReply

        def _new_conn(self) -> socket.socket:
            return _connect(guard, self)

        def getresponse(self) -> Any:
            return _with_bounded_headers(self.sock, super().getresponse)

    class Tls(HTTPSConnection):
        response_class = FinalReply

        def _new_conn(self) -> socket.socket:
            return _connect(guard, self)

        def getresponse(self) -> Any:
            return _with_bounded_headers(self.sock, super().getresponse)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    @lru_cache(maxsize=1)
    def context() -> ssl.SSLContext:
        # One for all connections: reading the machine's certificate authorities takes longer than a handshake.
        created = create_urllib3_context()
        created.sslsocket_class = _TlsSocket
        created.load_default_certs()
        return created

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, ssl_context=context())

    return {"http": PlainPool, "https": TlsPool}


def _with_bounded_headers(sock: Any, read: Any) -> Any:
    sock.header_bytes_left = MAX_HEADER_BYTES
    try:
        return read()
    finally:
        sock.header_bytes_left = None


def _connect(guard: AddressGuard, connection: Any) -> socket.socket:
    timeout_s = float(connection.timeout)
    try:
        if connection.proxy is not None:
            return guard.connect_trusted(connection.host, connection.port, timeout_s=timeout_s)
        return guard.connect(connection.host, connection.port, timeout_s=timeout_s, deadline_s=_deadline.at_s)
    except TimeoutError as error:
        raise urllib3.exceptions.ConnectTimeoutError(connection, f"connect timed out ({error})") from error
    except OSError as error:
        raise urllib3.exceptions.NewConnectionError(connection, f"can't connect ({error})") from error
