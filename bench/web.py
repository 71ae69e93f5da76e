"""A small HTTP server that is faster than its clients: `python -m bench.web FOLDER PORT PROCESSES READY_FILE`.

It answers GET /NAME with the file from memory, and keeps connections open. Several processes share the port,
so that the server never limits a measurement.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Final

MAX_HEAD_BYTES: Final = 16 * 1024
NOT_FOUND: Final = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
LOOPBACK: Final = "127.0.0.1"


class _Connection(asyncio.Protocol):
    """One connection: requests without bodies in, whole files out."""

    def __init__(self, replies: dict[bytes, bytes]) -> None:
        self._replies = replies
        self._pending = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        self._pending += data
        while (end := self._pending.find(b"\r\n\r\n")) >= 0:
            first_line = self._pending[: self._pending.index(b"\r\n")]
            self._pending = self._pending[end + 4 :]
            path = first_line.split(b" ")[1].partition(b"?")[0]
            self._transport.write(self._replies.get(path, NOT_FOUND))
        if len(self._pending) > MAX_HEAD_BYTES:
            self._transport.close()


def _replies(folder: Path) -> dict[bytes, bytes]:
    found = {}
    for path in folder.iterdir():
        body = path.read_bytes()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        found[f"/{path.name}".encode()] = head.encode() + body
    return found


async def _serve(folder: Path, port: int, ready_file: Path) -> None:
    replies = _replies(folder)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((LOOPBACK, port))
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(replies), sock=listener)
        ready_file.with_suffix(f".{os.getpid()}").touch()
        await server.serve_forever()


def main() -> None:
    """Serve until killed; all processes end with the group of the first."""
    folder, port, processes, ready_file = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    asyncio.run(_serve(folder, port, ready_file))


if __name__ == "__main__":
    main()
