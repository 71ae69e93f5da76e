"""Decides which addresses are public, by IANA's special-purpose registries in `ip_ranges.csv`.

`ipaddress.is_global` and `is_private` are not used: they are wrong for some ranges and differ between patch releases.
All ranges of the registries are refused, even globally reachable ones, because none of them serves images. An IPv6
address that contains an IPv4 address is checked as that IPv4 address.
"""

from __future__ import annotations

import csv
import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
REFUSED: Final = "refused"
_ISATAP: Final = frozenset({0x0000_5EFE, 0x0200_5EFE})
_LOW: Final = 0xFFFF_FFFF
_U_OCTET: Final = 8


@dataclass(frozen=True, slots=True)
class SpecialRange:
    """One row of the table."""

    network: IPNetwork
    name: str
    kind: str
    """`refused`, or how an IPv4 address is embedded: low, 6to4, teredo."""


def read_table() -> tuple[SpecialRange, ...]:
    """Return the table, most specific networks first."""
    lines = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    table = [SpecialRange(ipaddress.ip_network(row["network"]), row["name"], row["kind"]) for row in rows]
    return tuple(sorted(table, key=lambda row: row.network.prefixlen, reverse=True))


_TABLE: Final = read_table()
# The only part of IPv6 from which addresses of hosts are assigned.
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")


def special_use(address: IPAddress) -> str | None:
    """Return why an address itself is not public; None if it is. Embedded IPv4 addresses are not checked."""
    row = _row_of(address)
    if row is not None and row.kind == REFUSED:
        return row.name
    if row is None and address.version == 6 and address not in _GLOBAL_V6:
        return "not a global unicast address"
    return None


def effective_addresses(address: IPAddress, nat64: tuple[ipaddress.IPv6Network, ...] = ()) -> tuple[IPAddress, ...]:
    """Return the addresses that a packet to `address` may reach; all of them must be public.

    Args:
        nat64: further prefixes that this network translates to IPv4 (RFC 6052).
    """
    if address.version == 4:
        return (address,)
    for prefix in nat64:
        if address in prefix:
            return (_translated(address, prefix.prefixlen),)
    number = int(address)
    row = _row_of(address)
    match row.kind if row else "":
        case "low":
            return (ipaddress.IPv4Address(number & _LOW),)
        case "teredo":
            # The server, and the address of the client with all bits inverted.
            return (ipaddress.IPv4Address(number >> 64 & _LOW), ipaddress.IPv4Address(~number & _LOW))
        case "6to4":
            reached: tuple[IPAddress, ...] = (ipaddress.IPv4Address(number >> 80 & _LOW),)
        case _:
            reached = (address,)
    if number >> 32 & _LOW in _ISATAP:
        reached += (ipaddress.IPv4Address(number & _LOW),)
    return reached


def is_public(address: IPAddress, nat64: tuple[ipaddress.IPv6Network, ...] = ()) -> bool:
    """Return whether the address may be fetched from without a rule of the operator."""
    return all(special_use(effective) is None for effective in effective_addresses(address, nat64))


@lru_cache(maxsize=4096)
def _row_of(address: IPAddress) -> SpecialRange | None:
    return next((row for row in _TABLE if row.network.version == address.version and address in row.network), None)


def _translated(address: IPAddress, prefix_bits: int) -> ipaddress.IPv4Address:
    """Return the IPv4 address after a prefix of 32, 40, 48, 56, 64 or 96 bits; shorter prefixes skip byte 8."""
    packed = address.packed
    if prefix_bits < 96:
        packed = packed[:_U_OCTET] + packed[_U_OCTET + 1 :]
    return ipaddress.IPv4Address(packed[prefix_bits // 8 : prefix_bits // 8 + 4])
