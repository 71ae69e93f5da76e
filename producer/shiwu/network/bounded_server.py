"""An HTTP server whose connections are limited in number and time, because its port may be reachable by others."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from typing import Any, Final

MAX_CONNECTIONS: Final = 32


class BoundedServer(ThreadingMixIn, HTTPServer):
    """One thread for each connection. Over the limit it closes the oldest one: probes and scrapes are new and short.

    It waits for no request, so that slow clients hold up neither others nor the end of the process.
    """

    max_connection_s = 15.0
    """A connection is closed after this time, whatever its state."""
    daemon_threads = True
    block_on_close = False
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

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on its own thread."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _shut_down(oldest)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection whose request was answered."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close the connections that take too long. The base class calls this a few times a second."""
        late_s = time.monotonic() - self.max_connection_s
        with self._lock:
            for request, since_s in self._open.items():
                if since_s < late_s:
                    _shut_down(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report defects of this server; not that a client was too slow, or closed its connection."""
        if not isinstance(sys.exception(), OSError):
            self.report_defect(request, client_address)

    def report_defect(self, request: Any, client_address: Any) -> None:
        """Print the traceback of the exception that is being handled."""
        super().handle_error(request, client_address)


def _shut_down(request: socket.socket) -> None:
    """Shut a connection down; the thread that serves it gets an error and closes it."""
    with contextlib.suppress(OSError):  # the client has just closed it
        request.shutdown(socket.SHUT_RDWR)
