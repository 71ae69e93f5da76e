"""Host lists and ports of the operator."""

from __future__ import annotations

import pytest

from shiwu.network.address_rules import AddressRules, HostList


@pytest.mark.parametrize(
    ("entry", "host", "port", "is_listed"),
    [
        ("a.example", "a.example", 1, True),
        ("a.example:81", "a.example", 81, True),
        ("a.example:81", "a.example", 80, False),
        ("*.example", "a.example", 1, True),
        ("*.example", "example", 1, False),
        ("*.example:81", "a.example", 81, True),
        ("*.example:81", "a.example", 80, False),
        ("*.example:81", "A.B.Example.", 81, True),
        ("[fd00::1]:81", "[fd00::1]", 81, True),
        ("[fd00::1]:81", "fd00::1", 80, False),
        ("fd00::1", "[FD00:0::1]", 7, True),
    ],
)
def test_host_with_a_port_lists_only_that_port(entry: str, host: str, port: int, is_listed: bool) -> None:
    """Also for all subdomains of a name; without a port every port is listed."""
    assert HostList((entry,)).has(host, port) is is_listed


def test_web_servers_are_asked_on_their_usual_ports_only() -> None:
    """Unless the operator lists others."""
    assert AddressRules().ports == (80, 443)
