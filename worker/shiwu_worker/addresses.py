"""HTTP connections that reach public addresses only.

The guard sits where a socket is made, so redirects, retries and pool refills all pass it: one name look-up, every
answer judged, a connection to a judged address, and the peer compared. TLS keeps the name for SNI and verification.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Final

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from shiwu_worker.errors import AddressRefused

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
ADDRESSES_TRIED: Final = 4

# IANA's special-purpose registries, read 2026-11. `ipaddress.is_global` is wrong for some of them and differs by patch
# release, so the table is ours.
_BLOCKED: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's wire server
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_EMBEDDING: Final = (
    # network, bits to the right of the embedded IPv4 address
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (ipaddress.IPv6Network("::/96"), 0),  # compatible
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_BLOCKED_V6: Final = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20", "2620:4f:8000::/48")
)


def is_public(address: IPAddress) -> bool:
    """Whether the address may be fetched from without the operator's word. IPv4 inside IPv6 is judged as IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _BLOCKED)
    for network, shift in _EMBEDDING:
        if address in network:
            return is_public(ipaddress.IPv4Address((int(address) >> shift) & 0xFFFF_FFFF))
    return address in _GLOBAL_V6 and not any(address in network for network in _BLOCKED_V6)


class Guard:
    """Judges where a connection may go.

    Args:
        allow_hosts: `host` or `host:port` that may be reached whatever their addresses are; without a port, any.
    """

    def __init__(self, allow_hosts: tuple[str, ...]) -> None:
        self._allowed: set[tuple[str, int | None]] = set()
        for entry in allow_hosts:
            host, colon, port = entry.rpartition(":")
            with_port = bool(colon) and port.isdecimal() and not host.endswith(":")
            name = (host if with_port else entry).strip("[]").lower()
            self._allowed.add((name, int(port) if with_port else None))

    def connect(self, host: str, port: int, timeout_s: float | None) -> socket.socket:
        """Open a socket to a judged address of `host`.

        Raises:
            AddressRefused: the port, or any address of the name, is not allowed.
            OSError: no address answered.
        """
        name = host.strip("[]").lower()
        trusted = not self._allowed.isdisjoint({(name, port), (name, None)})
        if not trusted and port not in {80, 443}:
            raise AddressRefused(f"port {port}")
        found = socket.getaddrinfo(name, port, 0, socket.SOCK_STREAM)
        judged = [(ipaddress.ip_address(str(info[4][0]).partition("%")[0]), info) for info in found]
        if not trusted and (bad := [str(ip) for ip, _ in judged if not is_public(ip)]):
            raise AddressRefused(f"{host} resolves to {bad[0]}")
        last: OSError = OSError(f"no address for {host}")
        for ip, (family, kind, proto, _, address) in judged[:ADDRESSES_TRIED]:
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(timeout_s)
                sock.connect(address)
                if ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]) != ip:
                    raise AddressRefused("the peer is not the judged address")
            except OSError as error:
                sock.close()
                last = error
            except AddressRefused:
                sock.close()
                raise
            else:
                return sock
        raise last


def guarded_pool(*, allow_hosts: tuple[str, ...], threads: int) -> urllib3.PoolManager:
    """A pool manager whose every connection passes the guard. Proxies of the environment are not used."""
    guard = Guard(allow_hosts)

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(guard, self)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(guard, self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    manager = urllib3.PoolManager(num_pools=64, maxsize=threads, block=False)
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}
    return manager


def _connect(guard: Guard, connection: Any) -> socket.socket:
    timeout = connection.timeout
    seconds = float(timeout) if isinstance(timeout, int | float) else None
    connect: Callable[..., socket.socket] = guard.connect
    try:
        return connect(connection.host, connection.port, seconds)
    except TimeoutError as error:
        raise urllib3.exceptions.ConnectTimeoutError(connection, "connect timed out") from error
    except OSError as error:
        raise urllib3.exceptions.NewConnectionError(connection, f"can't connect ({type(error).__name__})") from error
