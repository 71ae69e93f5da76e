"""Threads for tries, which the dispatchers of all shards share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Final

URL_SHARE: Final = 2
"""The threads are this many times those that URLs of requests may use together."""


class TrySlots:
    """How many tries each endpoint may have at a time. Thread-safe.

    Args:
        threads: tries at a time.
        in_flight: tries at one endpoint at a time, of this process.
        is_named: whether a key is an endpoint of the operator, and not the origin of a URL in a request.
    """

    def __init__(self, *, threads: int, in_flight: int, is_named: Callable[[str], bool]) -> None:
        self._threads = threads
        self._in_flight = in_flight
        self._is_named = is_named
        self._used: Counter[str] = Counter()
        self._waiting: set[Event] = set()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="try")

    def reserve(self, key: str, *, wake: Event) -> int:
        """Reserve all slots that an endpoint may have now; return how many.

        Args:
            wake: set when a slot becomes free, if there is none now.
        """
        with self._lock:
            free = self._threads - self._used.total()
            if not self._is_named(key):
                by_urls = sum(count for name, count in self._used.items() if not self._is_named(name))
                free = min(free, max(1, self._threads // URL_SHARE) - by_urls)
            free = max(0, min(free, self._in_flight - self._used[key]))
            if free:
                self._used[key] += free
            else:
                self._waiting.add(wake)
        return free

    def release(self, key: str, count: int) -> None:
        """Give slots back, and wake those that wait for one."""
        if not count:
            return
        with self._lock:
            self._used[key] -= count
            if not self._used[key]:
                del self._used[key]
            waiting, self._waiting = self._waiting, set()
        for wake in waiting:
            wake.set()

    def submit(self, work: Callable[[], None]) -> None:
        """Run a try in a slot that was reserved."""
        self._pool.submit(work)

    def close(self) -> None:
        """Wait for the tries under way, each of which has a time-out."""
        self._pool.shutdown(wait=True)
