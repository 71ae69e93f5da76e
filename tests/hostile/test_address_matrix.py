"""Forms of hostile URLs: each is really fetched, and no request reaches the internal server."""

from __future__ import annotations

import socket
import time

import pytest
from msgspec.structs import replace

from shiwu.network.address_guard import AddressGuard, AddressRefused
from shiwu_worker.errors import Unavailable, Unreachable
from shiwu_worker.policy.access_rules import AccessRules
from tests.hostile.conftest import BODY, INNER, OUTER, PLAIN, SECRET, World, failure
from tests.support.picture_server import Reply

ARRIVES = [
    "http://good.example:OUT/a",
    "http://GOOD.example:OUT/a",
    "http://good.example.:OUT/a",
    "HTTP://good.example:OUT/a",
    "http://good.example:OUT/a?x=1#part",
    "http://127.0.0.1:OUT/a",
    "http://127.0.0.1.:OUT/a",
    "http://xn--fiqs8s.example:OUT/a",
]
REFUSED = [
    *("http://inner.example:IN/a", "http://INNER.example:IN/a", "http://inner.example.:IN/a", "http://127.0.0.2:IN/a"),
    *("http://mixed.example:OUT/a", "http://turned.example:OUT/a", "http://mapped.example:IN/a"),
    *("http://wrapped.example:OUT/a", "http://six.example:IN/a", "http://local.example:IN/a"),
    *("http://cloud.example/latest/meta-data", "https://cloud.example/", "http://odd.example/a"),
    # Loopback and others in every spelling of the C library.
    *("http://2130706434:IN/a", "http://0x7f000002:IN/a", "http://0x7f.0x0.0x0.0x2:IN/a", "http://127.2:IN/a"),
    *("http://0177.0.0.2:IN/a", "http://0177.0.0.02:IN/a", "http://127.0.2:IN/a", "http://017700000002:IN/a"),
    *("http://127.0.0.0x2:IN/a", "http://00000177.0.0.2:IN/a", "http://127.0.0.2.:IN/a", "http://127.000.000.002:IN/a"),
    *("http://0:IN/a", "http://0.0.0.0:IN/a", "http://0x0:IN/a", "http://00:IN/a", "http://127.1:IN/a"),
    *("http://4294967295/a", "http://99999999999/a", "http://256.256.256.256/a", "http://1.2.3.4.5/a"),
    # IPv6, plain and around IPv4.
    *("http://[::1]:IN/a", "http://[::]:IN/a", "http://[0:0:0:0:0:0:0:1]:IN/a", "http://[::ffff:127.0.0.2]:IN/a"),
    *("http://[::ffff:7f00:2]:IN/a", "http://[0:0:0:0:0:ffff:127.0.0.2]:IN/a", "http://[::127.0.0.2]:IN/a"),
    *("http://[::ffff:0:127.0.0.2]:IN/a", "http://[64:ff9b::127.0.0.2]:IN/a", "http://[64:ff9b::7f00:2]:IN/a"),
    *("http://[64:ff9b:1::127.0.0.2]:IN/a", "http://[2002:7f00:2::]:IN/a", "http://[2002:7f00:2::1]:IN/a"),
    *("http://[2001:0:7f00:2::]/a", "http://[2606:4700::5efe:7f00:2]/a", "http://[fe80::1]/a", "http://[fec0::1]/a"),
    *("http://[fc00::1]/a", "http://[fd00:ec2::254]/latest/meta-data", "http://[ff02::1]/a", "http://[2001:db8::1]/a"),
    # Services of clouds, and private networks.
    *("http://169.254.169.254/latest/meta-data", "http://169.254.170.2/v2/credentials", "http://100.100.100.200/a"),
    *("http://168.63.129.16/machine", "http://192.0.0.192/opc", "http://10.0.0.1/a", "https://10.0.0.1/a"),
    *("http://172.16.0.1/a", "http://192.168.0.1/a", "http://100.64.0.1/a", "http://198.18.0.1/a", "http://224.0.0.1/"),
    *("http://[::ffff:169.254.169.254]/a", "http://[::ffff:a9fe:a9fe]/a", "http://[64:ff9b::a9fe:a9fe]/a"),
    *("http://2852039166/a", "http://0xa9fea9fe/a", "http://0251.0376.0251.0376/a", "http://169.254.43518/a"),
    # Ports.
    *("http://good.example:22/a", "http://good.example:6379/a", "https://good.example:8443/a", "http://8.8.8.8:25/a"),
    # Names that are none.
    *("http://-:OUT/a", "http://*:OUT/a", "http://a,b:OUT/a", "http://$(id):OUT/a"),
]
UNKNOWN = ["http://good..example/a", "http://none.example/a", "http://never-heard-of.example/a"]
LATER = [
    *("http://later.example/a", "http://empty.example/a", "http://good.example:80/a", "https://good.example/a"),
    "http://127.0.0.1:443/a",
]
INVALID = [
    *(
        "http://user@good.example:OUT/a",
        "http://user:hush@good.example:OUT/a",
        "http://good.example:OUT@127.0.0.2:IN/a",
    ),
    *("http://127.0.0.2:IN\\@good.example:OUT/a", "http://good.example:OUT\\a", "http:\\\\good.example:OUT/a"),
    *("http://good.example:OUT/a b", "http://good.example:OUT/a\tb", "http://good.example:OUT/\r\nHost: x"),
    *("http://good.example\x00.127.0.0.2:OUT/a", "http://127.0.0.2\n:IN/a", "http://good.example:OUT/\x7f"),
    *("http://good.example:OUT/\u3000", "http://good.example:OUT/\u200b", "http://good.example:OUT/\u202e"),
    *("http://good.example:OUT/\x85", "http://good.example:OUT/\ud800", " http://good.example:OUT/a"),
    *("http://[fe80::1%25lo]:IN/a", "http://[fe80::1%lo]:IN/a", "http://127.0.0.%32:IN/a", "http://%6cocalhost:IN/a"),
    *("http://①②⑦.0.0.2:IN/a", "http://127。0。0。2:IN/a", "http://ｌｏｃａｌｈｏｓｔ:IN/a", "http://good.example:0/a"),
    *("http://good.example:65536/a", "http://good.example:-1/a", "http://good.example:0x50/a", "http:///a", "http://"),
    *("http:good.example/a", "https:/good.example/a", "http://[::1/a", "http://[nonsense]/a", "http://::1/a"),
    *("ftp://good.example/a", "gopher://127.0.0.2:IN/_a", "dict://127.0.0.2:IN/a", "data:image/png;base64,aGk="),
    *("javascript:alert(1)", "ldap://127.0.0.2/a", "unix:///run/a.sock", "a", "", "//127.0.0.2:IN/a"),
]


@pytest.mark.parametrize("url", ARRIVES)
def test_public_address_is_fetched(world: World, url: str) -> None:
    """One look-up for each, in every spelling of a name."""
    assert world.fetcher().fetch(world.url(url)) == BODY
    assert world.names.asked.total() == 1


@pytest.mark.parametrize("url", REFUSED)
def test_internal_address_is_refused(world: World, url: str) -> None:
    """Not retried, reported as an unavailable source; the log has the reason."""
    error = failure(world.fetcher(), f"{world.url(url)}?token={SECRET}")
    assert isinstance(error, Unreachable)
    assert error.detail is not None
    assert error.detail.startswith("refused: ")
    assert "no such name" not in error.detail
    assert not world.inner.hits + world.outer.hits
    assert world.names.asked.total() <= 1, "expected no second try"


@pytest.mark.parametrize("url", UNKNOWN)
def test_unknown_name_is_answered_like_a_refused_one(world: World, url: str) -> None:
    """Otherwise answers would show which internal names exist."""
    error = failure(world.fetcher(), world.url(url))
    refused = failure(world.fetcher(), "http://inner.example/a")
    assert type(error) is type(refused)
    assert replace(error.info(), message="") == replace(refused.info(), message="")
    assert str(error).rpartition(" ")[0] == str(refused).rpartition(" ")[0]


@pytest.mark.parametrize("url", LATER)
def test_source_without_connection_may_be_retried(world: World, url: str) -> None:
    """The error has the same words as for a refused address."""
    error = failure(world.fetcher(), world.url(url))
    refused = failure(world.fetcher(), world.url(url).replace("good.", "inner.").replace(OUTER, INNER))
    assert isinstance(error, Unavailable)
    assert replace(error.info(), message="") == replace(refused.info(), message="")
    assert str(error).rpartition(" ")[0] == str(refused).rpartition(" ")[0]


@pytest.mark.parametrize("url", INVALID)
def test_url_that_is_not_plain_is_refused_unread(world: World, url: str) -> None:
    """No name is looked up and no connection is made."""
    error = failure(world.fetcher(), world.url(url))
    assert error.code.value == "invalid_reference"
    assert not world.inner.hits + world.outer.hits
    assert not world.names.asked


def test_name_is_checked_again_at_each_connection(world: World) -> None:
    """Rebinding: the first answer is public, the second is not."""
    fetcher = world.fetcher()
    url = world.url("http://rebind.example:OUT/a")
    assert fetcher.fetch(url) == BODY
    assert isinstance(failure(fetcher, url), Unreachable)
    assert (world.names.asked["rebind.example"], world.outer.hits["/a"], world.inner.hits.total()) == (2, 1, 0)


def test_peer_that_differs_from_the_checked_one_is_refused(world: World) -> None:
    """Checked at the connected socket, whatever happens before."""

    class Elsewhere(socket.socket):
        def getpeername(self) -> tuple[str, int]:
            return INNER, 80

    guard = AddressGuard(world.access, resolve=world.names, make_socket=Elsewhere)
    with pytest.raises(AddressRefused, match="peer"):
        guard.connect("good.example", world.outer.port, timeout_s=1, deadline_s=time.monotonic() + 2)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1", "[2a00:1450::1]", "::ffff:8.8.8.8"])
def test_public_addresses_pass_the_guard(address: str) -> None:
    """Checked only: tests connect to no other machine."""
    assert not AddressGuard(AccessRules()).check_name(address, 443)


REDIRECTS_REFUSED = [
    *("http://inner.example:IN/a", "//inner.example:IN/a", "http://127.0.0.2:IN/a", "http://2130706434:IN/a"),
    *("http://[::ffff:127.0.0.2]:IN/a", "http://mixed.example:OUT/a", "http://169.254.169.254/latest/meta-data"),
    *("http://good.example:22/a", "http://cloud.example/a", "http://none.example/a"),
]
OUTWARD = ["/a", "a", "?x", "//good.example:OUT/a", "http://127.0.0.1:OUT/a", "/图".encode().decode("latin-1")]
REDIRECTS_ODD = [
    *("http://user:hush@good.example:OUT/a", "http://127.0.0.2:IN\\@good.example:OUT/a", "/a\\b", "/a b"),
    *("file:///etc/passwd", "s3://pictures/a", "ftp://good.example/a", "javascript:alert(1)", "http://", "http://[::1"),
    *("http://good.example:99999/a", "http://[fe80::1%25lo]:IN/a", "http://①②⑦.0.0.2:IN/a".encode().decode("latin-1")),
]


@pytest.mark.parametrize("to", REDIRECTS_REFUSED)
@pytest.mark.parametrize("status", [301, 307])
def test_redirect_to_an_internal_address_is_refused(world: World, to: str, status: int) -> None:
    """Each redirect is checked like the first URL; the error does not name its target."""
    world.outer.serve("/moved", Reply.redirect(f"{world.url(to)}?{SECRET}", status=status))
    error = failure(world.fetcher(), world.url("http://good.example:OUT/moved"))
    assert isinstance(error, Unreachable)
    assert str(error).endswith(world.url("http://good.example:OUT/moved"))
    assert not world.inner.hits


@pytest.mark.parametrize("to", REDIRECTS_ODD)
def test_redirect_to_no_url_is_refused(world: World, to: str) -> None:
    """Other schemes, user names, backslashes, white space."""
    world.outer.serve("/moved", Reply.redirect(world.url(to)))
    assert failure(world.fetcher(), world.url("http://good.example:OUT/moved")).code.value == "source_forbidden"
    assert not world.inner.hits
    assert not world.outer.hits["/a"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "to", ["/a", "a", "?x", "//good.example:OUT/a", "http://127.0.0.1:OUT/a", "/图".encode().decode("latin-1")]
)
def test_redirect_to_a_public_address_is_followed(world: World, status: int, to: str) -> None:
    """Relative and absolute, with every status."""
    world.outer.serve("/moved", Reply.redirect(world.url(to), status=status), PLAIN)
    world.outer.serve("/%E5%9B%BE", PLAIN)
    assert world.fetcher().fetch(world.url("http://good.example:OUT/moved")) == BODY


@pytest.mark.parametrize(("steps", "arrives"), [(1, True), (3, True), (4, False), (9, False)])
def test_redirects_are_followed_up_to_three(world: World, steps: int, arrives: bool) -> None:
    """A fourth redirect and a loop are refused."""
    for step in range(steps):
        world.outer.serve(f"/{step}", Reply.redirect(f"/{step + 1}"))
    world.outer.serve(f"/{steps}", PLAIN)
    url = world.url("http://good.example:OUT/0")
    if arrives:
        assert world.fetcher().fetch(url) == BODY
    else:
        assert failure(world.fetcher(), url).code.value == "source_forbidden"
    world.outer.serve("/circle", Reply.redirect("/circle"))
    assert failure(world.fetcher(), world.url("http://good.example:OUT/circle")).code.value == "source_forbidden"
    assert world.outer.hits["/circle"] == 4
