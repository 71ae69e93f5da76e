"""Starts loader processes without waiting for the fork server, so that a slow one does not delay the other loaders."""

from __future__ import annotations

import selectors
import socket
import struct
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.loaders.fork_server import ForkedProcess, ForkServer, ForkServerError

log: FilteringBoundLogger = structlog.get_logger()
IMPORT_TIMEOUT_S: Final = 60.0
"""Longest wait for the first fork of a fork server, which imports everything before; then the server is replaced."""
FORK_TIMEOUT_S: Final = 15.0
"""Longest wait for a later fork."""
MAX_FAILURES: Final = 2
"""Fork servers that may end or hang one after the other without a fork; then the pool ends."""
FRAME_TIMEOUT_S: Final = 5
"""Longest wait for a loader to take a frame; then it is replaced."""


@dataclass(frozen=True)
class _Request:
    """A request for a fork that has no reply yet."""

    own_end: socket.socket
    asked_s: float


class LoaderStarter:
    """Starts loaders one after the other. After `begin`, the pool's thread uses it.

    A fork server that hangs is replaced, and stays until the loaders that it forked have ended: they would end with it.

    Args:
        selector: in which the socket of the fork server is registered, with this object as its data.
        memory_fd: the slots, which loaders share with the worker.
    """

    def __init__(self, selector: selectors.BaseSelector, memory_fd: int) -> None:
        self._selector = selector
        self._memory_fd = memory_fd
        self._server = ForkServer()
        self._given_up: list[ForkServer] = []
        self._request: _Request | None = None
        self._failures = 0
        self._not_before_s = 0.0
        self.missing = 0
        """Loaders that are still to be started."""

    def begin(self) -> None:
        """Start the fork server without waiting for it. It ends with the thread that calls this."""
        self._server.begin()
        self._selector.register(self._server.channel, selectors.EVENT_READ, self)

    def start(self, count: int, *, delay_s: float = 0.0) -> None:
        """Let `advance` start so many more loaders, after this pause."""
        self.missing += count
        self._not_before_s = max(self._not_before_s, time.monotonic() + delay_s)

    def advance(self) -> list[tuple[ForkedProcess, Connection]]:
        """The loaders that were started since the last call. Never waits for the fork server.

        Raises:
            ForkServerError: one fork server after the other ended or hung.
        """
        started: list[tuple[ForkedProcess, Connection]] = []
        self._close_given_up()
        try:
            while (process := self._server.receive()) is not None:
                if self._request is not None:
                    started.append((process, Connection(self._request.own_end.detach())))
                    self._request, self._failures = None, 0
                    self.missing -= 1
                self._ask()
            self._ask()
            self._check_deadline()
        except ForkServerError as error:
            self._replace(error)
        return started

    def _ask(self) -> None:
        """Ask for the next loader, if one is missing and none is asked for."""
        if self._request is not None or not self.missing or time.monotonic() < self._not_before_s:
            return
        own_end, loader_end = socket.socketpair()
        with loader_end:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                own_end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", FRAME_TIMEOUT_S, 0))
            self._request = _Request(own_end, time.monotonic())
            self._server.request(loader_end.fileno(), self._memory_fd)

    def _check_deadline(self) -> None:
        timeout_s = FORK_TIMEOUT_S if self._server.has_forked else IMPORT_TIMEOUT_S
        if self._request is not None and time.monotonic() > self._request.asked_s + timeout_s:
            self._server.is_given_up = True
            raise ForkServerError(f"expected a forked process within {timeout_s:g} s")

    def _replace(self, error: ForkServerError) -> None:
        """Start another fork server, and ask it for the loader that is missing."""
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise error
        log.warning("fork_server_replaced", error=str(error), loaders=self._server.count_children())
        if self._request is not None:
            self._request.own_end.close()
            self._request = None
        self._selector.unregister(self._server.channel)
        if self._server.is_given_up:
            self._given_up.append(self._server)
        else:
            self._server.close()
        self._server = ForkServer()
        self.begin()
        self._ask()

    def _close_given_up(self) -> None:
        for server in [server for server in self._given_up if not server.count_children()]:
            server.close()
            self._given_up.remove(server)

    def close(self) -> None:
        """End the fork servers and, with them, the processes that they forked."""
        if self._request is not None:
            self._request.own_end.close()
            self._request = None
        for server in (self._server, *self._given_up):
            server.close()
        self._given_up.clear()
