"""Serves one WSGI application over HTTP, for processes that are no worker."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

MAX_CONNECTIONS: Final = 32
MAX_CONNECTION_S: Final = 15.0
"""A connection is closed after this time, whatever its state."""
READ_TIMEOUT_S: Final = 5.0
POLL_INTERVAL_S: Final = 0.1


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds and are of no interest."""


class _Server(ThreadingMixIn, WSGIServer):
    """One thread for each connection. Over the limit it closes the oldest connection: scrapes are new and short.

    No request is waited for, so that slow clients hold up neither others nor the end of the process.
    """

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, *args: Any, **named: Any) -> None:
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*args, **named)

    def server_bind(self) -> None:
        """Bind without the look-up of this host's name in the base class, which may block on a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "shiwu", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _shut_down(oldest)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close the connections that take too long. The base class calls this a few times a second."""
        late_s = time.monotonic() - MAX_CONNECTION_S
        with self._lock:
            for request, since_s in self._open.items():
                if since_s < late_s:
                    _shut_down(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print defects of this server; not that a client was too slow, or closed its connection."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _shut_down(request: socket.socket) -> None:
    """Shut a connection down; the thread that serves it gets an error and closes it."""
    with contextlib.suppress(OSError):  # the client has just closed it
        request.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve_app(app: WSGIApplication, *, host: str, port: int) -> Iterator[int]:
    """Answer HTTP requests until the block ends; yields the port, chosen by the system for 0.

    Raises:
        OSError: the address cannot be used.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    server_class = cast("type[WSGIServer]", type("_FamilyServer", (_Server,), {"address_family": family}))
    server = make_server(str(address[0]), port, app, server_class=server_class, handler_class=_Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": POLL_INTERVAL_S}, name="http", daemon=True
    )
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=READ_TIMEOUT_S)
