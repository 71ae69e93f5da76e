"""An HTTP server on loopback that serves pictures well or badly, as each path was told to."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.support.processes import LOOPBACK


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request gets. The constructors below name the usual ways to be good or bad."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_length: int | None = None
    """The length that is told; None tells the true one."""
    chunk_bytes: int = 1 << 16
    pause_s: float = 0.0
    """Wait between chunks; the connection is kept open and silent meanwhile."""
    first_pause_s: float = 0.0
    """Wait before the status line."""

    @classmethod
    def picture(cls, data: bytes, *, content_type: str = "image/jpeg") -> Self:
        """A picture, told as what it is."""
        return cls(body=data, headers={"Content-Type": content_type})

    @classmethod
    def error(cls, status: int) -> Self:
        """An error with a short text."""
        return cls(status=status, body=f"error {status}\n".encode(), headers={"Content-Type": "text/plain"})

    @classmethod
    def redirect(cls, to: str, *, status: int = 302) -> Self:
        """A redirection to a path or an URL."""
        return cls(status=status, headers={"Location": to})

    @classmethod
    def html(cls) -> Self:
        """A web page that calls itself a JPEG, as login pages and error pages do."""
        page = "<!doctype html><title>404</title><p>不是图片</p>".encode()
        return cls(body=page, headers={"Content-Type": "image/jpeg"})

    @classmethod
    def gzipped(cls, data: bytes) -> Self:
        """A body that is unpacked only by clients that trust Content-Encoding."""
        return cls(body=gzip.compress(data), headers={"Content-Type": "image/jpeg", "Content-Encoding": "gzip"})

    @classmethod
    def cut(cls, data: bytes, *, missing_bytes: int = 100) -> Self:
        """A body that ends before its told length."""
        return cls(body=data[:-missing_bytes], headers={"Content-Type": "image/jpeg"}, content_length=len(data))

    def tagged(self, etag: str) -> Self:
        """The same, with an ETag; a request that has this one gets 304 and no body."""
        return replace(self, headers={**self.headers, "ETag": etag})

    def drip(self, *, chunk_bytes: int = 1, pause_s: float = 0.2) -> Self:
        """The same, a few bytes at a time."""
        return replace(self, chunk_bytes=chunk_bytes, pause_s=pause_s)

    def late(self, *, first_pause_s: float) -> Self:
        """The same, after a silence."""
        return replace(self, first_pause_s=first_pause_s)


class PictureServer:
    """Serves the replies that `serve` was told; anything else is 404. Counts what it is asked.

    Args:
        address: one of loopback, 127.0.0.1 to 127.255.255.254.
        tls: speaks HTTPS with this.
        posts: the reply to every POST.
    """

    def __init__(
        self, *, address: str = LOOPBACK, tls: ssl.SSLContext | None = None, posts: Reply | None = None
    ) -> None:
        self._address = address
        self.posts = posts or Reply.error(405)
        self._tls = tls
        self._replies: dict[str, list[Reply]] = {}
        self._lock = threading.Lock()
        self.hits: Counter[str] = Counter()
        self.unmodified: Counter[str] = Counter()
        """Requests that were answered 304."""
        self.headers: dict[str, dict[str, str]] = {}
        """The headers of the last request of each path."""
        self.busiest = 0
        """Most requests that were in hand at one time."""
        self._busy = 0
        self.stopped = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen on a free port."""
        self._server = _Server((self._address, 0), self)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="picture-server",
            daemon=True,
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close; replies that still drip are cut off. A second stop is harmless."""
        self.stopped.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(10)
            self._server = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            raise RuntimeError("picture server: expected to be started")
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        """host:port, as SHIWU_ALLOW_HOSTS takes it."""
        return f"{self._address}:{self.port}"

    def url(self, path: str) -> str:
        """The URL of a path, which begins with a slash."""
        return f"http://{self.host}{path}"

    def serve(self, path: str, *replies: Reply) -> str:
        """Answer requests of `path` with these replies in turn, the last one forever. Return the URL."""
        with self._lock:
            self._replies[path] = list(replies)
        return self.url(path)

    def clear(self) -> None:
        """Forget all replies and counts; the port stays."""
        with self._lock:
            self._replies.clear()
            self.hits.clear()
            self.unmodified.clear()
            self.headers.clear()
            self.busiest = 0

    def reply_to(self, path: str, headers: Mapping[str, str]) -> Reply:
        """Count a request and take its reply. Called by the handlers."""
        with self._lock:
            self.hits[path] += 1
            self.headers[path] = dict(headers)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            waiting = self._replies.get(path.partition("?")[0])
            if not waiting:
                return Reply.error(404)
            reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            etag = reply.headers.get("ETag")
            if etag is not None and headers.get("If-None-Match") == etag:
                self.unmodified[path] += 1
                return Reply(status=304, headers={"ETag": etag})
            return reply

    def done(self) -> None:
        """One request is out of hand. Called by the handlers."""
        with self._lock:
            self._busy -= 1

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], pictures: PictureServer) -> None:
        self.pictures = pictures
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected here; what goes wrong is seen on the client's side."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def do_GET(self) -> None:
        pictures = self.server.pictures
        reply = pictures.reply_to(self.path, dict(self.headers))
        try:
            self._send(reply)
        finally:
            pictures.done()

    do_HEAD = do_GET  # noqa: N815 the name is the base class's

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._send(self.server.pictures.posts)

    def _send(self, reply: Reply) -> None:
        stopped = self.server.pictures.stopped
        if reply.first_pause_s and stopped.wait(reply.first_pause_s):
            return
        told = len(reply.body) if reply.content_length is None else reply.content_length
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(told))
        if told != len(reply.body):
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(reply.body), reply.chunk_bytes):
            self.wfile.write(reply.body[at : at + reply.chunk_bytes])
            if reply.pause_s and stopped.wait(reply.pause_s):
                self.close_connection = True
                return

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
