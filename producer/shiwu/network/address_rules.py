"""Rules for the hosts and addresses that a process may reach. Deny lists win over all others."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

HTTP_PORTS: Final = (80, 443)
NAT64_BITS: Final = frozenset({32, 40, 48, 56, 64, 96})


@dataclass(frozen=True, slots=True)
class AddressRules:
    """The operator's lists, each empty by default.

    Hosts are `name`, `*.name` (its subdomains) or an address, with or without `:port`; networks are CIDR.
    """

    allow_hosts: tuple[str, ...] = ()
    """Allowed with any address and port."""
    only_hosts: tuple[str, ...] = ()
    """If not empty, no other host is allowed over http and https."""
    deny_hosts: tuple[str, ...] = ()
    allow_networks: tuple[str, ...] = ()
    """Networks whose addresses count as public."""
    deny_networks: tuple[str, ...] = ()
    nat64_prefixes: tuple[str, ...] = ()
    """Prefixes, in addition to 64:ff9b::/96, that this network translates to IPv4."""
    ports: tuple[int, ...] = HTTP_PORTS
    proxy_url: str | None = None
    """Proxy for all http and https; the proxy must then check the addresses of host names."""


class HostList:
    """The hosts of one list.

    Raises:
        ValueError: an entry is not a host.
    """

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._names: set[tuple[str, int | None]] = set()
        self._suffixes: list[tuple[str, int | None]] = []
        for entry in entries:
            name, port = read_host(entry)
            if name.startswith("*."):
                self._suffixes.append((name[1:], port))
            else:
                self._names.add((name, port))

    def __bool__(self) -> bool:
        return bool(self._names or self._suffixes)

    def has(self, host: str, port: int) -> bool:
        """Return whether the list contains this host, for this port or for all ports."""
        name = plain_host(host)
        if not self._names.isdisjoint({(name, port), (name, None)}):
            return True
        return any(name.endswith(suffix) and only_port in {port, None} for suffix, only_port in self._suffixes)


def checked(read: Callable[[str], object]) -> Callable[[str], str]:
    """Return a function that returns its text if `read` can parse it; `read` raises ValueError otherwise."""

    def check(text: str) -> str:
        read(text)
        return text

    return check


def plain_host(host: str) -> str:
    """Return a host in the form for comparisons: lower case, no brackets or trailing dot, short addresses."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def read_host(entry: str) -> tuple[str, int | None]:
    """Parse `host` or `host:port`.

    Raises:
        ValueError: the entry is neither.
    """
    host, colon, port = entry.rpartition(":")
    # With more than one colon and no brackets it is an IPv6 address without a port.
    has_port = bool(colon) and port.isascii() and port.isdigit() and (":" not in host or host.endswith("]"))
    name = plain_host(host if has_port else entry)
    if not name or any(sign in name for sign in "/@?# \\") or "*" in name.removeprefix("*.") or name == "*.":
        raise ValueError(f"expected host, *.host or host:port, got {entry!r:.80}")
    if has_port and not 0 < int(port) < 65536:
        raise ValueError(f"expected a port from 1 to 65535, got {entry!r:.80}")
    return name, int(port) if has_port else None


def read_nat64(prefix: str) -> ipaddress.IPv6Network:
    """Parse a NAT64 prefix.

    Raises:
        ValueError: it is not an IPv6 network with a length of RFC 6052.
    """
    try:
        network = ipaddress.IPv6Network(prefix)
    except ValueError as error:
        raise ValueError(f"expected an IPv6 prefix as 64:ff9b:1::/48, got {prefix!r:.80} ({error})") from None
    if network.prefixlen not in NAT64_BITS:
        raise ValueError(f"expected a prefix of 32, 40, 48, 56, 64 or 96 bits, got {prefix!r:.80}")
    return network


def read_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Parse a network in CIDR form.

    Raises:
        ValueError: it is none.
    """
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"expected a network as 10.0.0.0/8 or fd00::/8, got {text!r:.80} ({error})") from None


def check_proxy(url: str) -> None:
    """Refuse a text that is not the URL of a proxy. The message omits it, because it may contain a password.

    Raises:
        ValueError: it is not one; the text says what was expected.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        # A password with `/`, `?` or `#` would otherwise be read as host, port and path, and be shown.
        is_valid = is_valid and parts.path in {"", "/"} and not (parts.query or parts.fragment)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            "expected http://[user:password@]host:port; in a password write %2F for /, %3F for ?, %23 for #, %40 for @"
        )
