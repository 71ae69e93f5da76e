"""Wakes an idle worker when a message enters an empty lane."""

from __future__ import annotations

import threading
from collections.abc import Collection

import redis

from shiwu.contract import (
    Lane,
)


class LaneNotifier:
    """Wakes an idle worker when a message enters an empty lane.

    `BLMOVE key key RIGHT RIGHT` waits without taking anything: it moves the oldest message to where it was. It watches
    one key, so each of the lanes' keys has a thread of its own; they rest while the worker is busy.
    """

    def __init__(self, client: redis.Redis, *, block_s: float = 5.0, lanes: Collection[Lane] = tuple(Lane)) -> None:
        self._client = client
        self._block_s = block_s
        self._idle = threading.Event()
        self._rung = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(key,), name=f"lane-notifier-{i}", daemon=True)
            for i, key in enumerate(key for lane in Lane if lane in lanes for key in lane.keys)
        ]

    def start(self) -> None:
        """Start the watching threads."""
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Block until a lane holds a message (True), or the time is over or the bell is closed (False)."""
        if self._closed.is_set():
            return False
        self._idle.set()
        try:
            return self._rung.wait(timeout_s)
        finally:
            self._idle.clear()
            # After the wait and not before: a ring between two waits must wake the second.
            self._rung.clear()

    def ring(self) -> None:
        """Wake whoever waits: there is work that no lane shows."""
        self._rung.set()

    def close(self) -> None:
        """Stop watching and wake whoever waits. Threads that are blocked on the server end with the process."""
        self._closed.set()
        self._idle.set()
        self._rung.set()

    def _watch(self, key: str) -> None:
        while not self._closed.is_set():
            if not self._idle.wait(1.0):
                continue
            try:
                if self._client.blmove(key, key, timeout=int(self._block_s), src="RIGHT", dest="RIGHT") is not None:
                    self._rung.set()
                    # The worker now claims; peeking again at once would only find the same message.
                    self._closed.wait(0.005)
            except (redis.RedisError, OSError):
                self._closed.wait(1.0)
