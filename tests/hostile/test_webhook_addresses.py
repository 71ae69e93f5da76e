"""No delivery of a webhook reaches an address that is not allowed, whatever its name resolves to, or a reply says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from shiwu.hooks.endpoints import Endpoint
from shiwu.hooks.sender import Sender
from shiwu.network.address_rules import AddressRules
from tests.hostile.conftest import INNER, OUTER, Names
from tests.support.webhook_receiver import Answered, WebhookReceiver


@dataclass
class Network:
    """A receiver at an address that counts as public, one at an address that does not, and names."""

    outer: WebhookReceiver
    inner: WebhookReceiver
    names: Names = field(default_factory=Names)

    def send(self, host: str, *, port: int | None = None, sender: Sender | None = None) -> str:
        """Deliver to this host, and return the reason of the outcome."""
        url = f"http://{host}:{self.outer.port if port is None else port}/hook"
        endpoint = Endpoint(key="a", url=url, keys=(b"k" * 24,))
        return (sender or self.sender()).send(endpoint, delivery_id="k.0", url=url, body=b"{}").reason

    def sender(self) -> Sender:
        """With rules by which only the outer address is public."""
        ports = (80, 443, self.outer.port, self.inner.port)
        rules = AddressRules(allow_networks=(f"{OUTER}/32",), ports=ports)
        return Sender(rules, timeout_s=3.0, threads=2, user_agent="test", resolve=self.names)


@pytest.fixture
def network() -> Iterator[Network]:
    """Both receivers."""
    with WebhookReceiver(address=OUTER) as outer, WebhookReceiver(address=INNER) as inner:
        yield Network(outer, inner)


def test_rebound_name_gets_no_request(network: Network) -> None:
    """A name that is public at its first look-up and not at the next; each connection has one look-up."""
    assert network.send("rebind.example") == "delivered"
    assert network.send("rebind.example", port=network.inner.port) == "address_refused"
    assert network.send("rebind.example") == "address_refused"
    assert (len(network.outer.received), len(network.inner.received)) == (1, 0)


def test_kept_connection_stays_at_its_checked_address(network: Network) -> None:
    """A name that has moved meanwhile is not looked up for it."""
    sender = network.sender()
    assert [network.send("rebind.example", sender=sender) for _ in range(3)] == ["delivered"] * 3
    assert (len(network.outer.received), len(network.inner.received)) == (3, 0)


@pytest.mark.parametrize(
    "host",
    ["mixed.example", "inner.example", "mapped.example", INNER, "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.2]"],
)
def test_forbidden_host_gets_no_request(network: Network, host: str) -> None:
    """A name with one bad address, addresses themselves, and unusual spellings."""
    assert network.send(host, port=network.inner.port) == "address_refused"
    assert (len(network.outer.received), len(network.inner.received)) == (0, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(network: Network, status: int) -> None:
    """It is a failure."""
    target = network.inner.url
    network.outer.behave = lambda _: Answered(status, {"Location": target})
    assert network.send(OUTER) == "redirect"
    assert (len(network.outer.received), len(network.inner.received)) == (1, 0)


def test_name_without_address_is_a_failure(network: Network) -> None:
    """As a forbidden one, but with another reason in the operator's log."""
    assert network.send("none.example") == "unknown_host"
