"""Lane notifier: lets the claim thread of an idle worker wait until a message enters a lane."""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Final

import redis
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu.contract import Lane

log: FilteringBoundLogger = structlog.get_logger()
POLL_INTERVAL_S: Final = 0.05
"""Between two looks at the lanes, where the server notifies of nothing."""
REDIS_PAUSE_S: Final = 1.0
"""Pause after an error of Redis, which the next claim reports."""


class LaneNotifier:
    """Waits for messages in the lanes with one connection, on the thread that calls `wait`.

    `EXISTS` asks for all lanes at once, and `CLIENT TRACKING` (client-side caching, Redis 6) then lets the server
    notify this connection of the next change of their keys. No message is moved, and an idle worker costs one command
    for each wait. A notification that another worker has claimed meanwhile costs one more `EXISTS`, and no claim.

    `wait` belongs to one thread; the other methods may be called from any thread, `close` from a signal handler too.

    Args:
        client: its connections use RESP3; one of them is held from the first wait to `close`.
        lanes: those that the worker serves; others are never waited for.
    """

    def __init__(self, client: redis.Redis, *, lanes: Collection[Lane] = tuple(Lane)) -> None:
        self._client = client
        self._lanes = frozenset(lanes)
        self._connection: Any = None
        self._is_notified = threading.Event()
        self._is_lost = False
        """Whether the connection is to be made anew."""
        self._can_track = True
        self._closed = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake)

    def wait(self, timeout_s: float, *, lanes: Collection[Lane] = tuple(Lane)) -> bool:
        """Block until one of these lanes has a message (True), or until the time-out or `close` (False).

        True also after `notify`. After an error of Redis it returns after a second at most.
        """
        until_s = time.monotonic() + timeout_s
        keys = [key for lane in Lane if lane in self._lanes and lane in lanes for key in lane.keys]
        while not self._closed.is_set():
            if self._is_notified.is_set():
                # Cleared after the wait and not before: a notification between two waits must end the second.
                self._is_notified.clear()
                return True
            try:
                if keys and self._has_message(keys):
                    return True
                self._wait_for_push(until_s - time.monotonic())
                if time.monotonic() >= until_s:
                    return False
            except (redis.RedisError, OSError):
                self._disconnect()
                self._pause(min(REDIS_PAUSE_S, max(0.0, until_s - time.monotonic())))
                return self._is_notified.is_set()
        return False

    def notify(self) -> None:
        """Wake the waiting thread, because there is work that no lane shows."""
        self._is_notified.set()
        self._interrupt()

    def reconnect(self) -> None:
        """Use a new connection from the next wait on: the server may have become a replica."""
        self._is_lost = True

    def close(self) -> None:
        """Wake the waiting thread; later waits return immediately."""
        self._closed.set()
        self._interrupt()

    # -------------------------------------------------------------------------------- on the waiting thread
    def _has_message(self, keys: list[str]) -> bool:
        """Ask for all keys, and track their next change."""
        if self._is_lost:
            self._is_lost = False
            self._disconnect()
        if self._connection is None:
            self._connection = self._client.connection_pool.get_connection()
            self._track()
        # Notifications that came before this reply are of earlier changes: reading the reply skips them.
        return int(self._ask("EXISTS", *keys)) > 0

    def _track(self) -> None:
        """Let the server notify this connection; where it refuses that, look at the lanes from now on."""
        if not self._can_track:
            return
        try:
            self._ask("CLIENT", "TRACKING", "ON")
        except redis.ResponseError as error:
            self._can_track = False
            log.warning("lane_tracking_refused", error=str(error)[:300], poll_interval_s=POLL_INTERVAL_S)

    def _ask(self, *command: str) -> Any:
        self._connection.send_command(*command, check_health=False)
        return self._connection.read_response()

    def _wait_for_push(self, timeout_s: float) -> None:
        """Block until the server notifies, `_interrupt` is called, or the time is over; the caller asks again."""
        if not self._can_track or self._connection is None:
            self._pause(min(timeout_s, POLL_INTERVAL_S))
            return
        if not self._connection.can_read(0):
            # redis-py can wait for the socket alone, but not for a wake-up beside it.
            self._pause(timeout_s, self._connection._sock)
        if self._connection.can_read(0):
            self._connection.read_response(push_request=True)

    def _pause(self, timeout_s: float, *sockets: Any) -> None:
        """Block until `_interrupt`, until something can be read, or until the time is over."""
        poll = select.poll()
        for descriptor in (self._wake, *(each.fileno() for each in sockets)):
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.disconnect()
            self._client.connection_pool.release(connection)

    def _interrupt(self) -> None:
        os.eventfd_write(self._wake, 1)
