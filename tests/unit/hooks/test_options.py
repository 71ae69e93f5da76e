"""Address rules and schedules from the environment."""

from __future__ import annotations

import pytest

from shiwu.hooks.options import DEFAULT_SCHEDULE, OptionsError, read_rules, read_schedule
from shiwu.network.address_rules import AddressRules


def test_default_schedule_takes_17_hours() -> None:
    """Seven tries, the first one immediately."""
    pauses = read_schedule(DEFAULT_SCHEDULE)
    assert (len(pauses), pauses[0], round(sum(pauses) / 3600, 1)) == (7, 0.0, 17.6)
    assert read_schedule(" 1.5s, 2m ,1h,1d") == (1.5, 120.0, 3600.0, 86_400.0)


@pytest.mark.parametrize("text", ["", "5", "5x", "-5s", "5s,,5s", "31d", ",".join(["1s"] * 51)])
def test_wrong_schedule_is_refused(text: str) -> None:
    """Another form, too many pauses, or too long."""
    with pytest.raises(ValueError, match="expected"):
        read_schedule(text)


def test_rules_are_those_of_workers() -> None:
    """From the same variables."""
    assert read_rules({}) == AddressRules()
    given = {
        "SHIWU_ALLOW_HOSTS": "a.example, *.b.example:81",
        "SHIWU_ONLY_HOSTS": "c",
        "SHIWU_DENY_HOSTS": "d",
        "SHIWU_ALLOW_NETWORKS": "10.0.0.0/8",
        "SHIWU_DENY_NETWORKS": "fd00::/8",
        "SHIWU_NAT64_PREFIXES": "64:ff9b:1::/48",
        "SHIWU_FETCH_PORTS": "443,8443",
        "SHIWU_PROXY_URL": "http://u:p@proxy:3128",
    }
    assert read_rules(given) == AddressRules(
        allow_hosts=("a.example", "*.b.example:81"),
        only_hosts=("c",),
        deny_hosts=("d",),
        allow_networks=("10.0.0.0/8",),
        deny_networks=("fd00::/8",),
        nat64_prefixes=("64:ff9b:1::/48",),
        ports=(443, 8443),
        proxy_url="http://u:p@proxy:3128",
    )
    assert read_rules({"SHIWU_FETCH_PORTS": "none"}).ports == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHIWU_ALLOW_HOSTS", "a/b"),
        ("SHIWU_DENY_NETWORKS", "10.0.0.1/8"),
        ("SHIWU_NAT64_PREFIXES", "64:ff9b::/97"),
        ("SHIWU_FETCH_PORTS", "0"),
        ("SHIWU_PROXY_URL", "socks://secret@h"),
    ],
)
def test_wrong_variable_is_named(name: str, value: str) -> None:
    """And a proxy is not quoted, because it may contain a password."""
    with pytest.raises(OptionsError, match=name) as caught:
        read_rules({name: value})
    assert "secret" not in str(caught.value)
