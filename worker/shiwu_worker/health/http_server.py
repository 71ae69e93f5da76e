"""HTTP server for /livez, /readyz and /metrics.

Serves probes and scrapers only: one GET for each connection. Size and duration of requests are limited, because the
port may be reachable by others.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

import structlog
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from structlog.typing import FilteringBoundLogger

from shiwu.network.bounded_server import BoundedServer
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.runtime.threads import ServiceThread

log: FilteringBoundLogger = structlog.get_logger()
MAX_REQUEST_BYTES: Final = 8 * 1024
MAX_CONNECTION_S: Final = 5.0
"""A connection is closed after this time, whatever its state."""
METRICS_CACHE_S: Final = 0.5
"""Metrics younger than this are sent again instead of being gathered, so that frequent scrapes cost little."""
POLL_INTERVAL_S: Final = 0.25
PLAIN: Final = "text/plain; charset=utf-8"


class HealthServer:
    """Serves from `start` to `close`.

    Args:
        port: 0 lets the operating system choose; the property `port` has it after the start.
        not_live: returns the reasons why the worker is not live; empty if it is.
        not_ready: returns the reasons why the worker is not ready; empty if it is.
        metrics: returns the body of /metrics.
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
        self._probes = {"/livez": not_live, "/readyz": not_ready}
        self._metrics = _CachedText(metrics)
        self._server: _Server | None = None
        self._thread: ServiceThread | None = None

    def start(self) -> None:
        """Listen and serve.

        Raises:
            FatalError: with ExitCode.CONFIG if the address is not available.
        """
        host, port = self._address
        try:
            self._server = server = _Server(self._address, self.page)
        except OSError as error:
            text = f"SHIWU_HTTP_HOST, SHIWU_HTTP_PORT: expected a free address, {host}:{port} gave: {error}"
            raise FatalError(ExitCode.CONFIG, text) from error
        self._thread = ServiceThread("http", partial(server.serve_forever, POLL_INTERVAL_S), on_fatal=None)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before the start."""
        return self._server.server_port if self._server is not None else 0

    def close(self) -> None:
        """Stop listening."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join(4 * POLL_INTERVAL_S)

    def page(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body of a path."""
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics.text()
        reasons_of = self._probes.get(path)
        if reasons_of is None:
            return 404, PLAIN, b"expected /livez, /readyz or /metrics\n"
        if reasons := reasons_of():
            return 503, PLAIN, "".join(f"{reason}\n" for reason in reasons).encode()
        return 200, PLAIN, b"ok\n"


class _CachedText:
    """A text that is made again once it is older than METRICS_CACHE_S, by one thread at a time."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._text = b""
        self._made_s = float("-inf")
        self._lock = threading.Lock()

    def text(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made_s > METRICS_CACHE_S:
                self._text, self._made_s = self._make(), time.monotonic()
            return self._text


class _Server(BoundedServer):
    max_connection_s = MAX_CONNECTION_S

    def __init__(self, address: tuple[str, int], page: Callable[[str], tuple[int, str, bytes]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.page = page
        super().__init__(address, _Handler)

    def report_defect(self, request: object, client_address: object) -> None:
        """Log the exception that is being handled."""
        log.exception("http_failed")


class _LimitedReader(io.RawIOBase):
    """The bytes that a client sends, up to a limit; past it a reader sees the end of the stream."""

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
    """Answers one GET or HEAD request."""

    server: _Server
    server_version, sys_version = "shiwu", ""
    timeout = MAX_CONNECTION_S

    def setup(self) -> None:
        """Limit the bytes that are read."""
        super().setup()
        self.rfile.close()
        self._head = _LimitedReader(self.connection, MAX_REQUEST_BYTES)
        self.rfile = io.BufferedReader(self._head)

    def do_GET(self) -> None:
        """Send a page."""
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
        """Send the headers of a page."""
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing: a line for each probe would hide the others."""
