"""The HTTP port: what it answers, and what a client can't do to it."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health import http_server as room
from shiwu_worker.health.http_server import MAX_CONNECTIONS, HealthServer
from tests.support.waiting import wait_until


class Told:
    """What the endpoint is told, and how often it asked for numbers."""

    def __init__(self) -> None:
        self.live: list[str] = []
        self.ready: list[str] = []
        self.gathered = 0

    def metrics(self) -> bytes:
        """A page."""
        self.gathered += 1
        return b"a 1\n"


@pytest.fixture
def told() -> Told:
    """All is well."""
    return Told()


@pytest.fixture
def served(told: Told) -> Iterator[HealthServer]:
    """On a port of its own."""
    made = HealthServer(
        host="127.0.0.1", port=0, not_live=lambda: told.live, not_ready=lambda: told.ready, metrics=told.metrics
    )
    made.start()
    yield made
    made.close()


def ask(served: HealthServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Status, content type and body."""
    client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    try:
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        client.close()


def dial(served: HealthServer) -> socket.socket:
    """A connection that says nothing yet."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=5)


def is_cut(client: socket.socket) -> bool:
    """Whether the server has ended the connection without an answer."""
    client.settimeout(5)
    try:
        return client.recv(100) == b""
    except ConnectionError:
        return True


def test_verdicts_are_told_with_their_reasons(served: HealthServer, told: Told) -> None:
    """200 when there is no reason against it, 503 with one a line."""
    assert ask(served, "/livez") == (200, room.PLAIN, "ok\n")
    told.live, told.ready = ["hung"], ["hung", "draining"]
    assert ask(served, "/livez") == (503, room.PLAIN, "hung\n")
    assert ask(served, "/readyz?verbose")[::2] == (503, "hung\ndraining\n")


def test_numbers_are_gathered_once_for_all_who_ask_too_often(served: HealthServer, told: Told) -> None:
    """Prometheus' content type; a second scrape at once gets the same page."""
    status, kind, body = ask(served, "/metrics")
    assert (status, body) == (200, "a 1\n")
    assert kind.startswith("text/plain; version=0.0.4")
    assert ask(served, "/metrics")[2] == "a 1\n"
    assert told.gathered == 1


def test_other_paths_and_methods_are_refused(served: HealthServer) -> None:
    """Nothing can be sent, and nothing else is there."""
    assert ask(served, "/")[0] == 404
    assert ask(served, "/metrics/../livez")[0] == 404
    assert ask(served, "/livez", method="HEAD") == (200, room.PLAIN, "")
    assert ask(served, "/livez", method="POST")[0] == 501


def test_a_request_is_short(served: HealthServer) -> None:
    """Neither a long path nor many headers are read to their end; what fills the limit may be half a request."""
    full = b"GET /livez HTTP/1.1\r\n" + b"X: " + b"y" * 8000 + b"\r\nY: "
    with dial(served) as client:
        client.sendall(full.ljust(room.MAX_BYTES - 4, b"z") + b"\r\n\r\n")
        assert b" 431 " in client.recv(1000)
    for request in (b"GET /" + b"a" * 20_000, b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 4_000 + b"\r\n"):
        with dial(served) as client:
            try:
                client.sendall(request)
                said = client.recv(1000)
            except ConnectionError:  # it hung up while we still sent
                said = b""
            assert b" 200 " not in said
    assert ask(served, "/livez")[0] == 200


def test_who_says_nothing_or_little_is_cut(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a client that sends a byte now and then, which no time-out of a single read would end."""
    monkeypatch.setattr(room, "CONNECTION_S", 0.5)
    with dial(served) as silent, dial(served) as dripping:

        def has_ended() -> bool:
            try:
                dripping.send(b"G")
            except ConnectionError:
                return True
            return False

        wait_until(has_ended, timeout_s=5, every_s=0.1, what="the end of one who drips")
        assert is_cut(silent)


def test_who_sits_there_is_cut_for_a_new_probe(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places taken by the silent: the next one is answered all the same, and no more threads stay than places."""
    # Nothing but the new one may end them here.
    monkeypatch.setattr(room, "CONNECTION_S", 60.0)
    monkeypatch.setattr(room._Handler, "timeout", 60.0)
    # Of other servers in this process, which are none of ours.
    others = set(threading.enumerate())
    silent = [dial(served) for _ in range(MAX_CONNECTIONS + 5)]
    try:
        assert ask(served, "/livez")[0] == 200
        assert is_cut(silent[0])

        def serving() -> int:
            threads = set(threading.enumerate()) - others
            return sum("process_request_thread" in one.name for one in threads)

        # Those that were cut need a moment to end.
        wait_until(lambda: serving() <= MAX_CONNECTIONS, timeout_s=10, what="no more threads than places")
    finally:
        for client in silent:
            client.close()


def test_a_defect_in_a_verdict_is_no_good_verdict(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prober is hung up on, and the next request is answered."""

    def fail(_: str) -> tuple[int, str, bytes]:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(served._server, "page", fail)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(served, "/readyz")
    assert ask(served, "/livez")[0] == 200


def test_a_port_that_is_taken_is_a_wrong_setting(served: HealthServer) -> None:
    """With the setting's name, and the exit code for it."""
    second = HealthServer(host="127.0.0.1", port=served.port, not_live=list, not_ready=list, metrics=bytes)
    with pytest.raises(FatalError, match="SHIWU_HTTP_PORT") as caught:
        second.start()
    assert caught.value.exit_code is ExitCode.CONFIG
    second.close()
