"""Serves one WSGI application over HTTP, for processes that are no worker."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from shiwu.network.bounded_server import BoundedServer

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

READ_TIMEOUT_S: Final = 5.0
POLL_INTERVAL_S: Final = 0.1


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds and are of no interest."""


class _Server(BoundedServer, WSGIServer):
    def server_bind(self) -> None:
        super().server_bind()
        self.setup_environ()


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
