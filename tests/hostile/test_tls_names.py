"""Certificates: the name in the URL counts, whatever address was checked and whatever the environment sets."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from shiwu_worker.errors import Rejected, Unavailable, Unreachable
from tests.hostile.conftest import BODY, PLAIN, World, failure
from tests.support.certificates import Certificate
from tests.support.picture_server import PictureServer, Reply


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the certificates lie."""
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def https(folder: Path) -> Iterator[PictureServer]:
    """A server that shows a certificate for good.example."""
    certificate = Certificate.make(folder, name="good.example")
    with PictureServer(tls=certificate.server_context()) as server:
        server.serve("/a", PLAIN)
        yield server


@pytest.fixture
def known(https: PictureServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> PictureServer:
    """The same, known to this machine."""
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "good.example.pem"))
    return https


def test_name_of_the_certificate_is_checked(world: World, known: PictureServer) -> None:
    """A connection to a checked address still sends the name, and only its certificate is accepted."""
    fetcher = world.fetcher(ports=(known.port,))
    for name in ("good.example", "GOOD.example", "good.example."):
        assert fetcher.fetch(f"https://{name}:{known.port}/a") == BODY
    for other in ("xn--fiqs8s.example", "127.0.0.1"):
        error = failure(fetcher, f"https://{other}:{known.port}/a")
        assert isinstance(error, Rejected)
        assert error.code.value == "source_forbidden"


def test_unknown_certificate_is_refused(world: World, https: PictureServer) -> None:
    """No trusted authority signed it."""
    error = failure(world.fetcher(ports=(https.port,)), f"https://good.example:{https.port}/a")
    assert (type(error), error.code.value) == (Rejected, "source_forbidden")


def test_plain_reply_on_a_tls_port_is_refused(world: World) -> None:
    """A plain server on the port: an answer that can't be read, perhaps a better one later."""
    assert isinstance(failure(world.fetcher(), world.url("https://good.example:OUT/a")), Unavailable)


def test_redirect_from_https_to_http_is_refused(world: World, known: PictureServer) -> None:
    """From http to https it may."""
    fetcher = world.fetcher(ports=(known.port, world.outer.port))
    for to in (world.url("http://good.example:OUT/a"), world.url("HTTP://good.example:OUT/a")):
        known.serve("/down", Reply.redirect(to))
        error = failure(fetcher, f"https://good.example:{known.port}/down")
        assert (type(error), error.code.value) == (Rejected, "source_forbidden")
    assert not world.outer.hits
    world.outer.serve("/up", Reply.redirect(f"https://good.example:{known.port}/a"))
    assert fetcher.fetch(world.url("http://good.example:OUT/up")) == BODY
    known.serve("/inward", Reply.redirect(world.url("https://inner.example:IN/a")))
    assert isinstance(failure(fetcher, f"https://good.example:{known.port}/inward"), Unreachable)


def test_slow_reply_inside_tls_ends(world: World, known: PictureServer) -> None:
    """The deadline reaches through the encryption."""
    known.serve("/drip", Reply.picture(BODY).drip(chunk_bytes=1, pause_s=0.1))
    error = failure(world.fetcher(ports=(known.port,), total_timeout_s=0.6), f"https://good.example:{known.port}/drip")
    assert isinstance(error, Unavailable)


class Tunnel:
    """A proxy that knows CONNECT only, and leads every name to one port of this machine."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self.asked: list[bytes] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, name="tunnel", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.create_connection(("127.0.0.1", self._to_port), timeout=5) as server:
                    client.settimeout(5)
                    self.asked.append(client.recv(65536).partition(b"\r\n")[0])
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    self._pass(client, server)

    @staticmethod
    def _pass(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                for one in select.select([client, server], [], [], 5)[0]:
                    if not (data := one.recv(65536)):
                        return
                    (server if one is client else client).sendall(data)


def test_name_is_checked_through_a_proxy(world: World, known: PictureServer) -> None:
    """The tunnel leads anywhere; the certificate must be for the name in the URL."""
    with Tunnel(known.port) as tunnel:
        fetcher = world.fetcher(proxy_url=f"http://127.0.0.1:{tunnel.port}")
        assert fetcher.fetch("https://good.example/a") == BODY
        assert failure(fetcher, "https://other.example/a").code.value == "source_forbidden"
        assert isinstance(failure(fetcher, "https://10.0.0.1/a"), Unreachable)
        assert [line.split()[1] for line in tunnel.asked] == [b"good.example:443", b"other.example:443"]
