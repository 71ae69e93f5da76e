"""TLS before a server that was built without it: decrypts what comes, and passes it on as it is."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from typing import Final, Self

from tests.support.processes import LOOPBACK

CHUNK_BYTES: Final = 1 << 16
WAIT_S: Final = 0.2
HANDSHAKE_S: Final = 10.0


class TlsFront:
    """Listens with TLS on a free port of loopback and forwards to `port`. A context manager."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._server = (LOOPBACK, port)
        self._context = context
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server((LOOPBACK, 0))
        self._listener.settimeout(WAIT_S)
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(HANDSHAKE_S)
        self._listener.close()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="tls-front", daemon=True)  # type: ignore[arg-type]  # targets take different arguments
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(HANDSHAKE_S)
        with (
            contextlib.suppress(OSError),
            raw,
            socket.create_connection(self._server) as server,
            self._context.wrap_socket(raw, server_side=True) as client,
        ):
            while not self._stopped.is_set():
                # What TLS has decrypted already, no `select` shows.
                ready = [client] if client.pending() else select.select([client, server], [], [], WAIT_S)[0]
                for source, target in ((client, server), (server, client)):
                    if source in ready:
                        data = source.recv(CHUNK_BYTES)
                        if not data:
                            return
                        target.sendall(data)
