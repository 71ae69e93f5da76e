"""What the operator lets a worker reach: hosts, networks, ports, buckets, folders. Deny lists win over all others."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

HTTP_PORTS: Final = (80, 443)
OTHER_ENDPOINTS: Final = ("--x-s3", "--xa-s3", "--op-s3")
"""Endings of bucket names for which the AWS SDK leaves the endpoint that is configured: S3 Express, Outposts."""
NAT64_BITS: Final = frozenset({32, 40, 48, 56, 64, 96})


@dataclass(frozen=True, slots=True)
class AccessRules:
    """The operator's lists, each empty by default.

    Hosts are `name`, `*.name` (what lies below it) or an address, with or without `:port`; networks are CIDR; buckets
    may end in `*`.
    """

    allow_hosts: tuple[str, ...] = ()
    """May be reached whatever their addresses and ports are."""
    only_hosts: tuple[str, ...] = ()
    """If not empty, no other host may be reached over http and https."""
    deny_hosts: tuple[str, ...] = ()
    allow_networks: tuple[str, ...] = ()
    """Addresses that count as public."""
    deny_networks: tuple[str, ...] = ()
    nat64_prefixes: tuple[str, ...] = ()
    """Prefixes, beside 64:ff9b::/96, behind which this network translates to IPv4."""
    ports: tuple[int, ...] = HTTP_PORTS
    allow_buckets: tuple[str, ...] = ()
    """If not empty, no other bucket may be read."""
    deny_buckets: tuple[str, ...] = ()
    allow_folders: tuple[Path, ...] = ()
    deny_folders: tuple[Path, ...] = ()
    proxy_url: str | None = None
    """All http and https goes through this proxy, which then has to judge the addresses of names."""
    tells_refusals: bool = False
    """Whether an answer says that it was these rules that refused the source."""


class HostList:
    """Host names of one list.

    Raises:
        ValueError: an entry is none.
    """

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._names: set[tuple[str, int | None]] = set()
        self._below: list[tuple[str, int | None]] = []
        for entry in entries:
            name, port = read_host(entry)
            if name.startswith("*."):
                self._below.append((name[1:], port))
            else:
                self._names.add((name, port))

    def __bool__(self) -> bool:
        return bool(self._names or self._below)

    def has(self, host: str, port: int) -> bool:
        """Whether the list names this host, for this port or for any."""
        name = plain_host(host)
        if not self._names.isdisjoint({(name, port), (name, None)}):
            return True
        return any(name.endswith(ending) and only in {port, None} for ending, only in self._below)


def checked(read: Callable[[str], object]) -> Callable[[str], str]:
    """Let a text through if `read`, which raises ValueError, can read it."""

    def check(text: str) -> str:
        read(text)
        return text

    return check


def plain_host(host: str) -> str:
    """A host as it is compared: lower case, no brackets, no dot at the end; addresses in their shortest form."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def read_host(entry: str) -> tuple[str, int | None]:
    """Read `host` or `host:port`.

    Raises:
        ValueError: it is none.
    """
    host, colon, port = entry.rpartition(":")
    # More than one colon is an IPv6 address without brackets, which then has no port.
    has_port = bool(colon) and port.isascii() and port.isdigit() and (":" not in host or host.endswith("]"))
    name = plain_host(host if has_port else entry)
    if not name or any(sign in name for sign in "/@?# \\") or "*" in name.removeprefix("*.") or name == "*.":
        raise ValueError(f"expected host, *.host or host:port, got {entry!r:.80}")
    if has_port and not 0 < int(port) < 65536:
        raise ValueError(f"expected a port from 1 to 65535, got {entry!r:.80}")
    return name, int(port) if has_port else None


def read_nat64(prefix: str) -> ipaddress.IPv6Network:
    """Read a prefix of NAT64.

    Raises:
        ValueError: it is no IPv6 network of a length that RFC 6052 knows.
    """
    try:
        network = ipaddress.IPv6Network(prefix)
    except ValueError as error:
        raise ValueError(f"expected an IPv6 prefix as 64:ff9b:1::/48, got {prefix!r:.80} ({error})") from None
    if network.prefixlen not in NAT64_BITS:
        raise ValueError(f"expected a prefix of 32, 40, 48, 56, 64 or 96 bits, got {prefix!r:.80}")
    return network


def allows_bucket(access: AccessRules, bucket: str) -> bool:
    """Whether the operator lets this bucket be read.

    A name that chooses another endpoint is read only where an entry of the list ends in the same way: `pictures*` does
    not allow `pictures--x-s3`.
    """
    if any(fnmatchcase(bucket, pattern) for pattern in access.deny_buckets):
        return False
    allowed = [pattern for pattern in access.allow_buckets if fnmatchcase(bucket, pattern)]
    if bucket.endswith(OTHER_ENDPOINTS):
        return any(pattern.endswith(OTHER_ENDPOINTS) for pattern in allowed)
    return bool(allowed) or not access.allow_buckets
