"""Lane notifier: wakes the claim loop of an idle worker when a message enters an empty lane."""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import partial

import redis

from shiwu.contract import Lane
from shiwu_worker.runtime.threads import ServiceThread


class LaneNotifier:
    """Wakes an idle worker when a message enters an empty lane.

    `BLMOVE key key RIGHT RIGHT` waits without taking a message: it moves the oldest one to where it was. It watches one
    key, so each key of the lanes has its own thread; these threads do nothing while the worker is busy.
    """

    def __init__(self, client: redis.Redis, *, block_s: float = 5.0, lanes: Collection[Lane] = tuple(Lane)) -> None:
        self._client = client
        self._block_s = block_s
        self._idle = {lane: threading.Event() for lane in Lane}
        self._notified = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            ServiceThread(f"lane-notifier-{i}", partial(self._watch, key, self._idle[lane]), on_fatal=None)
            for i, (lane, key) in enumerate((lane, key) for lane in Lane if lane in lanes for key in lane.keys)
        ]

    def start(self) -> None:
        """Start the watching threads."""
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float, *, lanes: Collection[Lane] = tuple(Lane)) -> bool:
        """Block until one of these lanes has a message (True), or until the time-out or `close` (False)."""
        if self._closed.is_set():
            return False
        for lane in lanes:
            self._idle[lane].set()
        try:
            return self._notified.wait(timeout_s)
        finally:
            for idle in self._idle.values():
                idle.clear()
            # Cleared after the wait and not before: a notification between two waits must wake the second.
            self._notified.clear()

    def notify(self) -> None:
        """Wake the waiting thread, because there is work that no lane shows."""
        self._notified.set()

    def close(self) -> None:
        """Stop watching and wake the waiting thread. Threads that are blocked on the server end with the process."""
        self._closed.set()
        for idle in self._idle.values():
            idle.set()
        self._notified.set()

    def _watch(self, key: str, idle: threading.Event) -> None:
        while not self._closed.is_set():
            if not idle.wait(1.0):
                continue
            try:
                if self._client.blmove(key, key, timeout=int(self._block_s), src="RIGHT", dest="RIGHT") is not None:
                    self._notified.set()
                    # The worker claims now; watching again immediately would find the same message.
                    self._closed.wait(0.005)
            except (redis.RedisError, OSError):
                self._closed.wait(1.0)
