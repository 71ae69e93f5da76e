"""`shiwu top --serve`: the newest look as a page and as JSON over HTTP, for a browser. Nothing can be changed."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from shiwu.top import rows
from shiwu.top.look import Look
from shiwu.top.once import print_tables
from shiwu.top.shards import Reader

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

COLUMNS: Final = 160
LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
)
_STYLE: Final = "body { background: #111; color: #ddd } pre { font: 14px/1.3 monospace }"


class TopPage:
    """A WSGI application: `/` is a page that reloads itself, `/look` JSON. Thread-safe.

    However many browsers ask, Redis is asked once in `every_s`.

    Args:
        where: the server, for the title.
        host: the address that is listened on. On loopback a request must name it or another local name, so that no
            page of the web can read the numbers by a name that leads here.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        where: str,
        host: str,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._where = where
        self._names = LOCAL_NAMES | {host} if host in LOCAL_NAMES or host.startswith("127.") else None
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s: float | None = None
        self._look = Look()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        if self._names is not None and _name(environ.get("HTTP_HOST", "")) not in self._names:
            return _reply(start_response, "403 Forbidden", b"expected a local name as the host\n", "text/plain")
        if environ.get("REQUEST_METHOD") != "GET":
            return _reply(start_response, "405 Method Not Allowed", b"expected GET\n", "text/plain")
        path = environ.get("PATH_INFO", "")
        if path == "/look":
            return _reply(start_response, "200 OK", msgspec.json.encode(self._newest()), "application/json")
        if path != "/":
            return _reply(start_response, "404 Not Found", b"expected / or /look\n", "text/plain")
        return _reply(start_response, "200 OK", self._page().encode(), "text/html; charset=utf-8")

    def _newest(self) -> Look:
        with self._lock:
            if self._looked_s is None or self._clock() - self._looked_s >= self._every_s:
                self._look = self._reader.look()
                self._looked_s = self._clock()
            return self._look

    def _page(self) -> str:
        look = self._newest()
        console = Console(
            record=True,
            file=io.StringIO(),
            width=COLUMNS,
            markup=False,
            emoji=False,
            highlight=False,
            force_terminal=True,
        )
        console.print(f"shiwu top  {self._where}", style="bold")
        if look.problem is not None:
            console.print(rows.problem_line(look), style="bold red")
        console.print()
        print_tables(console, look)
        shown = console.export_html(code_format="{code}", inline_styles=True)
        every_s = max(1, round(self._every_s))
        head = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{every_s}"><title>shiwu top</title>'
        style = f"<style>{_STYLE}</style>"
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{style}</head><body><pre>{shown}</pre></body></html>\n'


def _name(host: str) -> str:
    """The name in the header `Host`, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _reply(start_response: StartResponse, status: str, body: bytes, kind: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS])
    return [body]
