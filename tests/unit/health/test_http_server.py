"""The HTTP server: its answers, and its limits on what a client can do."""

from __future__ import annotations

import http.client
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from shiwu.network.bounded_server import MAX_CONNECTIONS
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health import http_server
from shiwu_worker.health.http_server import HealthServer
from tests.support.processes import ROOT
from tests.support.waiting import wait_until


class Sources:
    """What the server reads, and how often it gathered the metrics."""

    def __init__(self) -> None:
        self.live: list[str] = []
        self.ready: list[str] = []
        self.gathered = 0

    def metrics(self) -> bytes:
        """Return the page of metrics."""
        self.gathered += 1
        return b"a 1\n"


@pytest.fixture
def sources() -> Sources:
    """A worker that is live and ready."""
    return Sources()


@pytest.fixture
def served(sources: Sources) -> Iterator[HealthServer]:
    """A running server on a free port."""
    made = HealthServer(
        host="127.0.0.1",
        port=0,
        not_live=lambda: sources.live,
        not_ready=lambda: sources.ready,
        metrics=sources.metrics,
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


def connect(served: HealthServer) -> socket.socket:
    """A connection on which nothing was sent yet."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=5)


def is_closed(client: socket.socket) -> bool:
    """Whether the server closed the connection without an answer."""
    client.settimeout(5)
    try:
        return client.recv(100) == b""
    except ConnectionError:
        return True


def test_probe_with_reasons_is_503_with_a_line_each(served: HealthServer, sources: Sources) -> None:
    """200 without a reason."""
    assert ask(served, "/livez") == (200, http_server.PLAIN, "ok\n")
    sources.live, sources.ready = ["hung"], ["hung", "draining"]
    assert ask(served, "/livez") == (503, http_server.PLAIN, "hung\n")
    assert ask(served, "/readyz?verbose")[::2] == (503, "hung\ndraining\n")


def test_runbook_command_shows_the_reasons(served: HealthServer, sources: Sources) -> None:
    """The alert fires while the status is 503, which must not hide the body."""
    sources.ready = ["the canary got a wrong result"]
    [line] = (
        line for line in (ROOT / "docs/runbook.md").read_text(encoding="utf-8").splitlines() if "/readyz'" in line
    )
    [*_, code] = shlex.split(line)
    assert ":9808/" in code
    own = code.replace(":9808/", f":{served.port}/")
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, sources.ready[0]), done.stderr


def test_metrics_scraped_twice_are_gathered_once(served: HealthServer, sources: Sources) -> None:
    """With Prometheus' content type; a second scrape right after the first gets the same page."""
    status, kind, body = ask(served, "/metrics")
    assert (status, body) == (200, "a 1\n")
    assert kind.startswith("text/plain; version=0.0.4")
    assert ask(served, "/metrics")[2] == "a 1\n"
    assert sources.gathered == 1


def test_other_paths_and_methods_are_refused(served: HealthServer) -> None:
    """Clients cannot send a body, and there are no other pages."""
    assert ask(served, "/")[0] == 404
    assert ask(served, "/metrics/../livez")[0] == 404
    assert ask(served, "/livez", method="HEAD") == (200, http_server.PLAIN, "")
    assert ask(served, "/livez", method="POST")[0] == 501


def test_request_over_the_limit_is_refused(served: HealthServer) -> None:
    """Neither a long path nor many headers are read completely; a request that fills the limit gets a 431."""
    full = b"GET /livez HTTP/1.1\r\n" + b"X: " + b"y" * 8000 + b"\r\nY: "
    with connect(served) as client:
        client.sendall(full.ljust(http_server.MAX_REQUEST_BYTES - 4, b"z") + b"\r\n\r\n")
        assert b" 431 " in client.recv(1000)
    for request in (b"GET /" + b"a" * 20_000, b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 4_000 + b"\r\n"):
        with connect(served) as client:
            try:
                client.sendall(request)
                reply = client.recv(1000)
            except ConnectionError:  # it closed the connection while the client still sent
                reply = b""
            assert b" 200 " not in reply
    assert ask(served, "/livez")[0] == 200


def test_slow_client_is_disconnected(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that sends a byte now and then, so that no single read times out."""
    monkeypatch.setattr(http_server, "MAX_CONNECTION_S", 0.5)
    with connect(served) as silent, connect(served) as dripping:

        def has_ended() -> bool:
            try:
                dripping.send(b"G")
            except ConnectionError:
                return True
            return False

        wait_until(has_ended, timeout_s=5, every_s=0.1, what="the end of the slow connection")
        assert is_closed(silent)


def test_new_probe_replaces_an_idle_connection(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all connections idle the next request is still answered, and the number of threads stays limited."""
    # So that only the new request ends them here.
    monkeypatch.setattr(http_server, "MAX_CONNECTION_S", 60.0)
    monkeypatch.setattr(http_server._Handler, "timeout", 60.0)
    # Threads of other servers in this process.
    others = set(threading.enumerate())
    silent = [connect(served) for _ in range(MAX_CONNECTIONS + 5)]
    try:
        assert ask(served, "/livez")[0] == 200
        assert is_closed(silent[0])

        def serving() -> int:
            threads = set(threading.enumerate()) - others
            return sum("process_request_thread" in one.name for one in threads)

        # Threads of closed connections need a moment to end.
        wait_until(lambda: serving() <= MAX_CONNECTIONS, timeout_s=10, what="no more threads than connections")
    finally:
        for client in silent:
            client.close()


def test_defect_in_a_probe_is_no_success(served: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed without an answer, and the next request is answered."""

    def fail(_: str) -> tuple[int, str, bytes]:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(served._server, "page", fail)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(served, "/readyz")
    assert ask(served, "/livez")[0] == 200


def test_port_in_use_is_a_configuration_error(served: HealthServer) -> None:
    """With the name of the setting and exit code 64."""
    second = HealthServer(host="127.0.0.1", port=served.port, not_live=list, not_ready=list, metrics=bytes)
    with pytest.raises(FatalError, match="SHIWU_HTTP_PORT") as caught:
        second.start()
    assert caught.value.exit_code is ExitCode.CONFIG
    second.close()
