"""A receiver of webhooks on loopback: an HTTP server that keeps what it gets, and answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.support.processes import LOOPBACK


@dataclass(frozen=True, slots=True)
class Received:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The id of the delivery."""
        return self.headers["webhook-id"]


@dataclass(frozen=True, slots=True)
class Answered:
    """What one request gets."""

    status: int = 204
    headers: Mapping[str, str] = ()  # type: ignore[assignment]  # the empty tuple stands for no headers
    parts: Iterable[bytes] = ()
    """The body in pieces."""
    pause_s: float = 0.0
    """Between two pieces, and between two bytes of the status line where `is_dripping`."""
    is_dripping: bool = False
    """Whether the status line comes byte by byte."""
    hang: bool = False
    """Whether no answer comes until the receiver is closed."""


Behave = Callable[[Received], Answered]


class WebhookReceiver:
    """Serves until it is closed. Change `behave` at any time; `received` has the requests in their order."""

    def __init__(self, behave: Behave = lambda _: Answered(), *, address: str = LOOPBACK) -> None:
        self.behave = behave
        self.address = address
        self.received: list[Received] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_POST(self) -> None:
                receiver._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that is killed or gives up closes its connection; that is no error here."""

        self._server = Server((address, 0), Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Of a path of its own."""
        return f"http://{self.address}:{self.port}/hook"

    def ids(self) -> list[str]:
        """The ids of the deliveries that came, in their order, repeated ones too."""
        with self._lock:
            return [each.id for each in self.received]

    def release(self) -> None:
        """Let requests that hang end."""
        self._closed.set()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(length)
        if len(body) < length:  # the sender was killed
            return
        got = Received(handler.path, {name.lower(): value for name, value in handler.headers.items()}, body)
        with self._lock:
            self.received.append(got)
        self._answer(handler, self.behave(got))

    def _answer(self, handler: BaseHTTPRequestHandler, answered: Answered) -> None:
        if answered.hang:
            self._closed.wait(60)
            handler.close_connection = True
            return
        if answered.is_dripping:
            handler.close_connection = True
            for byte in b"HTTP/1.1 204 No Content\r\nX-Pad: " + b"x" * 10_000:
                handler.wfile.write(bytes([byte]))
                if self._closed.wait(answered.pause_s):
                    return
        parts = list(answered.parts)
        handler.send_response(answered.status)
        for name, value in dict(answered.headers).items():
            handler.send_header(name, value)
        if answered.status != 204:
            handler.send_header("Content-Length", str(sum(map(len, parts))))
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()
            if answered.pause_s and self._closed.wait(answered.pause_s):
                return

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
