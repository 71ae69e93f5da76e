"""A TCP proxy between a Redis client and its server that cuts, holds, refuses or delays what passes."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from tests.support.processes import LOOPBACK

Side = Literal["request", "reply"]
Ends = tuple[socket.socket, socket.socket]  # source, target
CHUNK_BYTES: Final = 1 << 16
TICK_S: Final = 0.01
DEADLINE_S: Final = 5.0
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on with no time: closing sends RST instead of FIN


class _Link:
    """One connection, from client to server and back."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends: dict[Side, Ends] = {"request": (client, server), "reply": (server, client)}
        self.pending: dict[Side, deque[tuple[float, bytes]]] = {"request": deque(), "reply": deque()}
        self.is_answered_elsewhere = False

    def write(self, side: Side, now_s: float) -> None:
        """Send what may pass by now; who does not take it for long loses the connection."""
        pending = self.pending[side]
        try:
            while pending and pending[0][0] <= now_s:
                self.ends[side][1].sendall(pending.popleft()[1])
        except OSError:
            self.end(side)
            pending.clear()

    def end(self, side: Side) -> None:
        """Read no more; of this side what is pending still passes, of the other nothing."""
        self.is_answered_elsewhere = True
        self.pending["reply" if side == "request" else "request"].clear()

    def close(self) -> None:
        """Reset the client's side, close the server's."""
        client, server = self.ends["request"]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        server.close()


class FaultProxy:
    """A context manager. Faults may be set at any time, from any thread, and hold when the call returns.

    Its thread owns every socket and works, but for waiting, under the lock that faults are set under: so the reply of a
    request that was cut behind its last byte never passes, and `cuts`, `sent_bytes`, `reply_bytes` are never behind.
    """

    def __init__(self, server_url: str) -> None:
        self._server = (LOOPBACK, urlsplit(server_url).port or 6379)
        self._changed = threading.Condition()
        self._cut_after: dict[Side, int] = {}
        self._is_holding, self._is_refusing, self._is_stopped = False, True, False
        self._delay_s = 0.0
        self._links: list[_Link] = []
        self._listener: socket.socket | None = None
        self.sent_bytes = self.reply_bytes = self.cuts = self._rounds = 0

    def __enter__(self) -> Self:
        # Bound and never listening, it keeps the port ours while `refuse` has closed the listener.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((LOOPBACK, 0))
        self._port = int(self._holder.getsockname()[1])
        self.url = f"redis://{LOOPBACK}:{self._port}/0"
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self._port}", daemon=True)
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            raise TimeoutError(f"expected {self._thread.name} to end within {DEADLINE_S} s")

    def cut_request_after(self, n_bytes: int) -> None:
        """Pass so many more bytes to the server, then reset their connection; once. 0 fires at the next byte."""
        with self._changed:
            self._cut_after["request"] = n_bytes

    def cut_reply_after(self, n_bytes: int) -> None:
        """The same for bytes to the client: the server has executed the command by then."""
        with self._changed:
            self._cut_after["reply"] = n_bytes

    def black_hole(self) -> None:
        """Keep connections, let new ones in, and pass nothing on."""
        with self._changed:
            self._is_holding = True

    def refuse(self) -> None:
        """Reset all connections and refuse new ones."""
        with self._changed:
            self._is_refusing = True
            self._await_round()

    def delay(self, seconds: float) -> None:
        """Hold every chunk of a reply up by this, from when it is read."""
        with self._changed:
            self._delay_s = seconds

    def heal(self) -> None:
        """End every fault, unfired cuts too. What a black hole held passes now, even if its client has hung up."""
        with self._changed:
            self._cut_after.clear()
            self._is_holding, self._delay_s = False, 0.0
            if self._is_refusing:
                self._is_refusing = False
                self._await_round()

    def _await_round(self) -> None:
        seen = self._rounds
        if not self._changed.wait_for(lambda: self._rounds > seen, DEADLINE_S):
            raise TimeoutError(f"expected the proxy to take notice within {DEADLINE_S} s")

    def _run(self) -> None:
        ready: list[socket.socket] = []
        try:
            while not self._is_stopped:
                with self._changed:
                    self._step(ready, time.monotonic())
                    self._rounds += 1
                    self._changed.notify_all()
                    live = [] if self._is_holding else [link for link in self._links if not link.is_answered_elsewhere]
                    awaited = [end for link in live for end in link.ends["request"]]
                    awaited += [self._listener] if self._listener else []
                ready, _, _ = select.select(awaited, [], [], TICK_S)
        finally:
            self._shut()
            self._holder.close()

    def _step(self, ready: list[socket.socket], now_s: float) -> None:
        if self._is_refusing:
            self._shut()
        elif self._listener is None:
            self._listener = socket.create_server((LOOPBACK, self._port))
        elif self._listener in ready:
            self._accept(self._listener.accept()[0])
        for link in [] if self._is_holding else list(self._links):
            for side in link.ends:
                if link.ends[side][0] in ready and not link.is_answered_elsewhere:
                    self._read(link, side, now_s)
                link.write(side, now_s)
            if link.is_answered_elsewhere and not any(link.pending.values()):
                self._links.remove(link)
                link.close()

    def _accept(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server, timeout=DEADLINE_S)
        except OSError:
            client.close()
            return
        client.settimeout(DEADLINE_S)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(_Link(client, server))

    def _read(self, link: _Link, side: Side, now_s: float) -> None:
        try:
            data = link.ends[side][0].recv(CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            link.end(side)
            return
        left = self._cut_after.pop(side, None)
        if left is not None and left <= len(data):
            data = data[:left]
            link.end(side)
            self.cuts += 1
        elif left is not None:
            self._cut_after[side] = left - len(data)
        if side == "request":
            self.sent_bytes += len(data)
        else:
            self.reply_bytes += len(data)
            now_s += self._delay_s
        link.pending[side].append((now_s, data))

    def _shut(self) -> None:
        while self._links:
            self._links.pop().close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
