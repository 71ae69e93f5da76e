"""The HTTP server of processes that are no worker: slow clients hold up nothing."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from shiwu.cli import http_server
from shiwu.cli.http_server import serve_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

LOOPBACK = "127.0.0.1"
CLIENTS = 40
"""More than any limit of the server."""


def page(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answers each request with one word."""
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may take a minute for each byte, as one does that sends a byte now and then."""
    monkeypatch.setattr(http_server._Handler, "timeout", 60.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test has opened."""
    with ExitStack() as stack:
        yield stack


def half_request(stack: ExitStack, port: int) -> socket.socket:
    """A connection whose request never ends."""
    client = stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=20))
    client.sendall(b"GET / HT")
    return client


def read(port: int) -> bytes:
    """The page."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/", timeout=20) as reply:
        return bytes(reply.read())


@pytest.mark.usefixtures("slow_reads")
def test_page_is_served_beside_slow_clients(stack: ExitStack) -> None:
    """More of them than the server serves at a time."""
    port = stack.enter_context(serve_app(page, host=LOOPBACK, port=0))
    for _ in range(CLIENTS):
        half_request(stack, port)
    assert read(port) == b"ok"


@pytest.mark.usefixtures("slow_reads")
def test_end_does_not_wait_for_slow_clients(stack: ExitStack) -> None:
    ended = Event()

    def serve_and_end() -> None:
        with serve_app(page, host=LOOPBACK, port=0) as port:
            for _ in range(CLIENTS):
                half_request(stack, port)
        ended.set()

    Thread(target=serve_and_end, daemon=True).start()
    assert ended.wait(20)


@pytest.mark.usefixtures("slow_reads")
def test_slow_client_is_closed_after_its_time(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server._Server, "max_connection_s", 0.2)
    port = stack.enter_context(serve_app(page, host=LOOPBACK, port=0))
    assert half_request(stack, port).recv(1) == b""
    assert read(port) == b"ok"


def test_client_that_goes_away_leaves_no_traceback(stack: ExitStack, capfd: pytest.CaptureFixture[str]) -> None:
    with serve_app(page, host=LOOPBACK, port=0) as port:
        half_request(stack, port).close()
        assert read(port) == b"ok"
    assert capfd.readouterr().err == ""


def test_start_asks_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that does not answer would hold up the start."""
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("looked a name up"))
    with serve_app(page, host=LOOPBACK, port=0) as port:
        assert read(port) == b"ok"
