"""Networks on loopback: 127.0.0.1 stands for the public network, 127.0.0.2 for the internal one."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from shiwu.network.address_guard import ResolvedAddress
from shiwu.network.http_client import HttpClient
from shiwu_worker.errors import JobError
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import FetchLimits, S3Options
from shiwu_worker.stages.fetch.fetcher import Fetcher
from tests.support.picture_server import PictureServer, Reply

OUTER, INNER = "127.0.0.1", "127.0.0.2"
SECRET = "hush"
BODY = b"a picture's bytes"
PLAIN = Reply(body=BODY, headers={"Connection": "close"})


class Names:
    """A name server: each name has a list of answers, given in turn; the last one is repeated."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.silent = threading.Event()
        """Set to let the name `slow.example` have its answer."""
        self._answers: dict[str, list[tuple[str, ...] | int]] = {
            "good.example": [(OUTER,)],
            "xn--fiqs8s.example": [(OUTER,)],
            "inner.example": [(INNER,)],
            "mixed.example": [(OUTER, INNER)],
            "turned.example": [(INNER, OUTER)],
            "rebind.example": [(OUTER,), (INNER,)],
            "mapped.example": [(f"::ffff:{INNER}",)],
            "wrapped.example": [(OUTER, "64:ff9b::10.0.0.1")],
            "six.example": [("::1",)],
            "local.example": [("fe80::1%1",)],
            "cloud.example": [("169.254.169.254",)],
            "empty.example": [()],
            "odd.example": [("nonsense",)],
            "none.example": [socket.EAI_NONAME],
            "later.example": [socket.EAI_AGAIN],
            "slow.example": [(OUTER,)],
        }

    def __call__(self, host: str, port: int) -> Sequence[ResolvedAddress]:
        """Return the answer for a name; addresses are spelled as by the system's resolver."""
        self.asked[host] += 1
        if host == "slow.example":
            self.silent.wait(10)
        answers = self._answers.get(host)
        if answers is None:
            return [(one[0], one[4]) for one in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            raise socket.gaierror(answer, "as configured")
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, (one, port)) for one in answer]


@dataclass
class World:
    """Servers on both sides, names for them, and fetchers that may reach the outer side."""

    outer: PictureServer
    inner: PictureServer
    names: Names = field(default_factory=Names)

    @property
    def access(self) -> AccessRules:
        """The outer address counts as public, and the servers' ports are allowed."""
        return AccessRules(allow_networks=(f"{OUTER}/32",), ports=(80, 443, self.outer.port, self.inner.port))

    def fetcher(
        self, *, total_timeout_s: float = 5.0, read_timeout_s: float = 2.0, max_bytes: int = 10_000, **rules: object
    ) -> Fetcher:
        """A fetcher; `rules` change the access rules."""
        access = replace(self.access, **rules)  # type: ignore[arg-type]  # fields of AccessRules
        web = HttpClient(access, threads=2, connect_timeout_s=1.0, read_timeout_s=read_timeout_s, resolve=self.names)
        limits = FetchLimits(max_bytes, total_timeout_s, connect_timeout_s=1.0, read_timeout_s=read_timeout_s)
        return Fetcher(s3=S3Options(None, "us-east-1"), http_client=web, access=access, limits=limits, threads=2)

    def url(self, text: str) -> str:
        """A URL with :IN and :OUT replaced by the ports of the servers."""
        return text.replace(":IN", f":{self.inner.port}").replace(":OUT", f":{self.outer.port}")


def failure(fetcher: Fetcher, url: str) -> JobError:
    """Return the error of a fetch; assert that neither it nor the log has a secret."""
    with pytest.raises(JobError) as caught:
        fetcher.fetch(url)
    assert SECRET not in f"{caught.value} {caught.value.detail}"
    return caught.value


@pytest.fixture(scope="module")
def both_servers() -> Iterator[tuple[PictureServer, PictureServer]]:
    """The outer and the inner one."""
    with PictureServer(address=OUTER) as outer, PictureServer(address=INNER) as inner:
        yield outer, inner


@pytest.fixture
def world(both_servers: tuple[PictureServer, PictureServer]) -> Iterator[World]:
    """Both servers, with BODY under /a."""
    for server in both_servers:
        server.clear()
        server.serve("/a", PLAIN)
    made = World(*both_servers)
    yield made
    made.names.silent.set()
