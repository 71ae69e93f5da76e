"""A TCP server on loopback that says exactly what a test tells it to, byte by byte if need be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Self

from tests.support.processes import LOOPBACK

Script = Callable[[], Iterable[bytes]]
"""What to send on one connection, piece by piece; the request's first bytes have been read by then."""


class RawServer:
    """Serves one script to every connection; `pause_s` lies between its pieces."""

    def __init__(self, script: Script, *, pause_s: float = 0.0) -> None:
        self._script = script
        self._pause_s = pause_s
        self._stopped = threading.Event()
        self.connections = 0

    def __enter__(self) -> Self:
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="raw-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # Closing alone would leave the other thread in `accept`.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(10)
            try:
                client.recv(65536)
                for piece in self._script():
                    client.sendall(piece)
                    if self._pause_s and self._stopped.wait(self._pause_s):
                        return
            except OSError:
                return


def says(*pieces: bytes, then: bytes | None = None) -> Script:
    """These pieces, and then one more piece again and again; without `then` the connection ends."""

    def script() -> Iterable[bytes]:
        yield from pieces
        if then is not None:
            yield from repeat(then)

    return script
