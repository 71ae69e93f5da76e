"""The HTTP port: /livez, /readyz, /metrics.

For probes and scrapers only: one GET for each connection, with a limit on all that a stranger could make long.
"""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import structlog
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from shiwu_worker.errors import ExitCode, FatalError

log: Any = structlog.get_logger()
MAX_CONNECTIONS: Final = 32
MAX_BYTES: Final = 8 * 1024
CONNECTION_S: Final = 5.0
"""A connection is cut after so long, whatever it was doing."""
FRESH_S: Final = 0.5
"""Numbers so young are sent again instead of being gathered anew: who asks too often must not slow the worker."""
POLL_INTERVAL_S: Final = 0.25
PLAIN: Final = "text/plain; charset=utf-8"


class HealthServer:
    """Serves from `start` to `close`.

    Args:
        port: 0 lets the system choose; see `port` after the start.
        not_live, not_ready: reasons, empty when all is well.
        metrics: the text of /metrics.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        not_live: Callable[[], Sequence[str]],
        not_ready: Callable[[], Sequence[str]],
        metrics: Callable[[], bytes],
    ) -> None:
        self._address = (host, port)
        self._verdicts = {"/livez": not_live, "/readyz": not_ready}
        self._metrics = _Fresh(metrics)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen and answer.

        Raises:
            FatalError: with ExitCode.CONFIG when the address can't be had.
        """
        host, port = self._address
        try:
            self._server = server = _Server(self._address, self.page)
        except OSError as error:
            text = f"SHIWU_HTTP_HOST, SHIWU_HTTP_PORT: expected a free address, {host}:{port} gave: {error}"
            raise FatalError(ExitCode.CONFIG, text) from error
        self._thread = threading.Thread(target=server.serve_forever, args=(POLL_INTERVAL_S,), name="http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; 0 before the start."""
        return self._server.server_port if self._server is not None else 0

    def close(self) -> None:
        """Stop listening."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join(timeout=4 * POLL_INTERVAL_S)

    def page(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body of a path."""
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics.text()
        verdict = self._verdicts.get(path)
        if verdict is None:
            return 404, PLAIN, b"expected /livez, /readyz or /metrics\n"
        if reasons := verdict():
            return 503, PLAIN, "".join(f"{reason}\n" for reason in reasons).encode()
        return 200, PLAIN, b"ok\n"


class _Fresh:
    """A text that is made anew when it is older than FRESH_S, by one thread at a time."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._text = b""
        self._made_s = float("-inf")
        self._lock = threading.Lock()

    def text(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made_s > FRESH_S:
                self._text, self._made_s = self._make(), time.monotonic()
            return self._text


class _Server(ThreadingHTTPServer):
    """One thread a connection. Of too many the oldest is cut: a probe is new, who sits there is not."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], page: Callable[[str], tuple[int, str, bytes]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.page = page
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the base class' look-up of this host's name, which may wait for a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "shiwu", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread of its own."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _cut(oldest)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that was answered."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut those that take too long; called a few times a second."""
        late_s = time.monotonic() - CONNECTION_S
        with self._lock:
            for request, since_s in self._open.items():
                if since_s < late_s:
                    _cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong on our side; not that a client went away."""
        if not isinstance(sys.exception(), OSError):
            log.exception("http_failed")


def _cut(request: socket.socket) -> None:
    """End a connection under the thread that serves it, which then closes it."""
    with contextlib.suppress(OSError):  # it has just ended by itself
        request.shutdown(socket.SHUT_RDWR)


class _Bounded(io.RawIOBase):
    """What a client sends, up to a number of bytes; then it is as if it had hung up."""

    def __init__(self, connection: socket.socket, max_bytes: int) -> None:
        self._connection = connection
        self.left = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._connection.recv_into(memoryview(buffer)[: self.left]) if self.left else 0
        self.left -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    """Answers one GET or HEAD."""

    server: _Server
    server_version, sys_version = "shiwu", ""
    timeout = CONNECTION_S

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self.rfile.close()
        self._head = _Bounded(self.connection, MAX_BYTES)
        self.rfile = io.BufferedReader(self._head)

    def do_GET(self) -> None:
        """One of the pages."""
        if not self._head.left:
            self.send_error(431)
            return
        status, kind, body = self.server.page(self.path.partition("?")[0])
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        """The same without its body."""
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing: a line for each probe would hide all others."""


CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
