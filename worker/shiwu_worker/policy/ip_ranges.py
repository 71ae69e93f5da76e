"""Which addresses are public: judged by a table of IANA's special-purpose registries, `ip_ranges.csv`.

`ipaddress.is_global` and `is_private` are not asked: they are wrong for some ranges and differ by patch release.
Whatever the registries list is refused, also what they call globally reachable, for no picture lies there. IPv4 inside
IPv6 is judged as the IPv4 address that a packet ends at.
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
    judged: str
    """`refused`, or the form in which an IPv4 address lies in it: low, 6to4, teredo."""


def read_table() -> tuple[SpecialRange, ...]:
    """The table, most specific networks first."""
    lines = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    table = [SpecialRange(ipaddress.ip_network(row["network"]), row["name"], row["judged"]) for row in rows]
    return tuple(sorted(table, key=lambda row: row.network.prefixlen, reverse=True))


_TABLE: Final = read_table()
# The only part of IPv6 from which addresses of hosts are given out.
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")


def special_use(address: IPAddress) -> str | None:
    """Why an address, taken as it stands, is not public; None where it is."""
    row = _row_of(address)
    if row is not None and row.judged == REFUSED:
        return row.name
    if row is None and address.version == 6 and address not in _GLOBAL_V6:
        return "not a global unicast address"
    return None


def effective_addresses(address: IPAddress, nat64: tuple[ipaddress.IPv6Network, ...] = ()) -> tuple[IPAddress, ...]:
    """The addresses at which a packet to `address` may end; all of them must be public.

    Args:
        nat64: further prefixes behind which this network translates to IPv4 (RFC 6052).
    """
    if address.version == 4:
        return (address,)
    for prefix in nat64:
        if address in prefix:
            return (_translated(address, prefix.prefixlen),)
    number = int(address)
    row = _row_of(address)
    match row.judged if row else "":
        case "low":
            return (ipaddress.IPv4Address(number & _LOW),)
        case "teredo":
            # The server, and the client's own address with every bit turned over.
            return (ipaddress.IPv4Address(number >> 64 & _LOW), ipaddress.IPv4Address(~number & _LOW))
        case "6to4":
            found: tuple[IPAddress, ...] = (ipaddress.IPv4Address(number >> 80 & _LOW),)
        case _:
            found = (address,)
    if number >> 32 & _LOW in _ISATAP:
        found += (ipaddress.IPv4Address(number & _LOW),)
    return found


def is_public(address: IPAddress, nat64: tuple[ipaddress.IPv6Network, ...] = ()) -> bool:
    """Whether the address may be fetched from without the operator's word."""
    return all(special_use(one) is None for one in effective_addresses(address, nat64))


@lru_cache(maxsize=4096)
def _row_of(address: IPAddress) -> SpecialRange | None:
    return next((row for row in _TABLE if row.network.version == address.version and address in row.network), None)


def _translated(address: IPAddress, prefix_bits: int) -> ipaddress.IPv4Address:
    """The IPv4 address behind a prefix of 32, 40, 48, 56, 64 or 96 bits; byte 8 is skipped by the shorter ones."""
    packed = address.packed
    if prefix_bits < 96:
        packed = packed[:_U_OCTET] + packed[_U_OCTET + 1 :]
    return ipaddress.IPv4Address(packed[prefix_bits // 8 : prefix_bits // 8 + 4])
