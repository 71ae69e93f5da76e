"""The table of special addresses: refused and public ranges, also embedded in IPv6."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest

from shiwu.network import ip_ranges as special_addresses
from shiwu.network.ip_ranges import effective_addresses, is_public, read_table


def listed(text: str) -> list[str]:
    """The addresses of a text, with white space between them."""
    return text.split()


REFUSED = listed("""
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.1.2.3 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.1
127.0.0.2 127.1.2.3 127.255.255.255 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 169.254.170.23
169.254.255.255 172.16.0.1 172.17.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10 192.0.0.170
192.0.0.171 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.88.99.2 192.168.0.1 192.168.255.255
192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
:: ::1 ::2 ::127.0.0.1 ::10.0.0.1 ::169.254.169.254 ::ffff:0.0.0.0 ::ffff:127.0.0.1 ::ffff:10.0.0.1
::ffff:100.64.0.1 ::ffff:169.254.169.254 ::ffff:192.168.1.1 ::ffff:255.255.255.255 ::ffff:0:127.0.0.1
::ffff:0:8.8.8.8 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b::100.100.100.200 64:ff9b:1::1
64:ff9b:1::8.8.8.8 64:ff9b:1:a00:1:: 64:ff9b:1:ffff::10.0.0.1 100::1 100:0:0:1::1 200::1 400::1 1000::1 2001::1
2001:0:7f00:1:: 2001:0:0a00:1::f7f7:f7f7 2001:0:808:808:0:0:80ff:fffe 2001:0:808:808:0:0:5601:5601 2001:1::1
2001:1::2 2001:1::3 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff::1 2001:db8::1
2001:db8:ffff::1 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe:: 2002:c0a8:101::1 2002:808:808::5efe:a00:1
2606:4700::5efe:7f00:1 2606:4700::5efe:a9fe:a9fe 2606:4700::200:5efe:a00:1 2620:4f:8000::1 3fff::1 3fff:fff::1
4000::1 5f00::1 8000::1 c000::1 fc00::1 fd00:ec2::23 fd00:ec2::254 fdff:ffff::1 fe00::1 fe80::1 fe80::a9fe:a9fe
febf::1 fec0::1 feff::1 ff00::1 ff02::1 ff05::2 ffff::1
""")
PUBLIC = listed("""
1.0.0.1 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.0.3.0
192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0
223.255.255.255 2000::1 2001:200::1 2001:4860:4860::8888 2001:db7::1 2001:db9::1 2003::1 2400:cb00::1 2606:4700::1
2a00:1450:4001::1 3ffe::1 ::8.8.8.8 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1 2001:0:808:808:0:0:f7f7:f7f7
2606:4700::5efe:808:808 2606:4700::200:5efe:808:808
""")


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    """Every registered range, further reserved ones, and IPv4 addresses in every embedding."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    """The neighbours of every range, and public IPv4 addresses in every embedding."""
    assert is_public(ipaddress.ip_address(address))


def test_every_row_covers_its_whole_range() -> None:
    """First and last address; embedded addresses count as what they embed."""
    for row in read_table():
        for address in (row.network[0], row.network[-1]):
            assert row.kind != "refused" or not is_public(address), row


@pytest.mark.parametrize(
    ("prefix", "wrapped"),
    [
        ("2a00:64::/32", "2a00:64:{a:x}{b:02x}:{c:x}{d:02x}::"),
        ("2a00:64:100::/40", "2a00:64:1{a:02x}:{b:02x}{c:02x}:{d:x}::"),
        ("2a00:64:1::/48", "2a00:64:1:{a:x}{b:02x}:{c:x}:{d:02x}00::"),
        ("2a00:64:1:100::/56", "2a00:64:1:1{a:02x}:{b:x}:{c:02x}{d:02x}::"),
        ("2a00:64:1:1::/64", "2a00:64:1:1:{a:x}:{b:02x}{c:02x}:{d:02x}00:0"),
        ("2a00:64:1:1::/96", "2a00:64:1:1::{a:x}{b:02x}:{c:x}{d:02x}"),
        ("64:ff9b:1::/96", "64:ff9b:1::{a:x}{b:02x}:{c:x}{d:02x}"),
        ("64:ff9b:1::/48", "64:ff9b:1:{a:x}{b:02x}:{c:x}:{d:02x}00::"),
    ],
)
def test_nat64_of_the_network_is_checked_by_its_target(prefix: str, wrapped: str) -> None:
    """Every length of RFC 6052; the operator has to name the prefix."""
    network = ipaddress.IPv6Network(prefix)
    inner, outer = ([int(part) for part in text.split(".")] for text in ("10.0.0.1", "93.184.216.34"))
    for parts, public in ((inner, False), (outer, True)):
        a, b, c, d = parts
        text = wrapped.format(a=a, b=b, c=c, d=d)
        address = ipaddress.IPv6Address(text)
        assert address in network
        assert effective_addresses(address, (network,)) == (ipaddress.IPv4Address(".".join(map(str, parts))),)
        assert is_public(address, (network,)) is public


REGISTERED = listed("""
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4
255.255.255.255/32 ::1/128 ::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32
2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28
2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10
""")
"""All blocks of both registries, as published by iana.org on 2026-07-18."""


def test_table_equals_the_registries() -> None:
    """The table has every block, and others only if marked."""
    rows = Path(special_addresses.__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    table = {row.split(",")[0]: row for row in rows if not row.startswith(("#", "network"))}
    assert set(REGISTERED) <= table.keys()
    beside = table.keys() - set(REGISTERED)
    assert beside == {network for network, row in table.items() if "not in the registry" in row}
    assert len(REGISTERED) == 51


def test_table_has_its_date() -> None:
    """Its date, and the registries that it follows."""
    text = Path(special_addresses.__file__).with_suffix(".csv").read_text(encoding="utf-8")
    assert re.search(r"as of 20\d\d-\d\d-\d\d", text)
    assert "iana-ipv4-special-registry" in text
    assert "iana-ipv6-special-registry" in text
    assert len(REFUSED) + len(PUBLIC) >= 150
