"""Which addresses are public, and that the guard checks every address of a name."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Sequence

import pytest

from shiwu.network.address_guard import AddressGuard, AddressRefused, Resolve, ResolvedAddress
from shiwu.network.address_rules import AddressRules
from shiwu.network.ip_ranges import is_public

BLOCKED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001::1",
    "2001:db8::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "3fff::1",
    "5f00::1",
    "100::1",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "172.32.0.1",
    "2606:4700::1",
    "64:ff9b::808:808",
    "2002:808:808::",
    "::ffff:8.8.8.8",
]


@pytest.mark.parametrize("address", BLOCKED)
def test_special_addresses_are_not_public(address: str) -> None:
    """Private, loopback, link-local, metadata, documentation, multicast; IPv4 inside IPv6 counts as IPv4."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_ordinary_addresses_are_public(address: str) -> None:
    """Also through NAT64, as IPv6-only clusters reach them."""
    assert is_public(ipaddress.ip_address(address))


def connect(guard: AddressGuard, host: str, port: int) -> socket.socket:
    """Connect with short time limits."""
    return guard.connect(host, port, timeout_s=5.0, deadline_s=time.monotonic() + 10)


def answers(*addresses: str) -> Resolve:
    """A resolver that gives these addresses for every name."""

    def resolve(_: str, port: int) -> Sequence[ResolvedAddress]:
        return [(socket.AF_INET, (each, port)) for each in addresses]

    return resolve


def test_one_internal_address_refuses_the_name() -> None:
    """A name with a public and an internal address is refused before any connection."""
    with pytest.raises(AddressRefused):
        connect(AddressGuard(AddressRules(), resolve=answers("8.8.8.8", "127.0.0.1")), "mixed.example", 80)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "0", "[::1]"])
def test_spellings_of_loopback_are_refused(host: str) -> None:
    """Odd spellings as such, a name for what it resolves to."""
    with pytest.raises(AddressRefused):
        connect(AddressGuard(AddressRules()), host, 80)


def test_ports_and_exceptions_of_the_operator() -> None:
    """Only 80 and 443, except for hosts that the operator named, with their port or for any."""
    with pytest.raises(AddressRefused, match="port"):
        connect(AddressGuard(AddressRules()), "127.0.0.1", 8080)
    with pytest.raises(AddressRefused):
        connect(AddressGuard(AddressRules(allow_hosts=("127.0.0.1:8081",))), "127.0.0.1", 8080)
    for entry in ("127.0.0.1:1", "127.0.0.1"):
        with pytest.raises(ConnectionRefusedError):
            connect(AddressGuard(AddressRules(allow_hosts=(entry,))), "127.0.0.1", 1)


@pytest.mark.parametrize(
    ("network", "address"),
    [
        ("64:ff9b::/96", "64:ff9b::808:808"),
        ("2002::/16", "2002:808:808::1"),
        ("2001::/32", "2001:0:808:808::f7f7:f7f7"),
        ("::ffff:0:0/96", "::ffff:8.8.8.8"),
        ("2000::/3", "2606:4700::1111"),
    ],
)
def test_denied_ipv6_network_that_wraps_ipv4_is_refused(network: str, address: str) -> None:
    """The operator denies the tunnel itself, although the IPv4 address behind it is public; no rule overrides it."""
    rules = AddressRules(deny_networks=(network,), allow_networks=("0.0.0.0/0", "::/0"), allow_hosts=(address,))
    with pytest.raises(AddressRefused, match="SHIWU_DENY_NETWORKS"):
        AddressGuard(rules).check_address(ipaddress.ip_address(address), is_trusted=True)
