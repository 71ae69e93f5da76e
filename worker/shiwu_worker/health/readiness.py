"""Readiness of a worker: its claims succeed, most shards answer, and it receives the broadcasts of Celery's clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()


class Readiness:
    """Combines claims, shards and broadcasts into one state. Thread-safe.

    Args:
        on_change: called with the new state under the lock, by the thread that causes the change.
        revoke_wait_s: after this time a worker that claims and receives no broadcasts is ready nevertheless, and the
            log says so. 0: broadcasts are ignored.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[bool], None],
        revoke_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self._limit_s = revoke_wait_s
        self._lock = threading.Lock()
        self._is_claiming = self._is_receiving_revokes = self._is_ready = False
        self._are_shards_away = self._is_waiting = False
        self._waiting_since_s: float | None = None

    def claiming(self, *, active: bool) -> None:
        """Report that claims succeed, or no longer do."""
        with self._lock:
            self._is_claiming = active
            self._update()

    def most_shards_away(self, *, active: bool) -> None:
        """Report that most shards do not answer, or no longer so."""
        with self._lock:
            self._are_shards_away = active
            self._update()

    def receiving_revokes(self, *, active: bool) -> None:
        """Report that broadcasts are received, or no longer are."""
        with self._lock:
            self._is_receiving_revokes = active
            self._update()

    def check_limit(self) -> None:
        """Become ready if `revoke_wait_s` has passed. Called once a second."""
        with self._lock:
            self._update()

    def is_waiting_for_revokes(self) -> bool:
        """Return whether the worker claims and does not receive broadcasts yet."""
        return self._is_waiting

    def _update(self) -> None:
        if self._is_claiming and not self._is_receiving_revokes:
            self._is_waiting = not self._is_wait_over()
        else:
            self._is_waiting, self._waiting_since_s = False, None
        is_ready = self._is_claiming and not self._are_shards_away and not self._is_waiting
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._on_change(is_ready)

    def _is_wait_over(self) -> bool:
        now_s = self._clock()
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        is_over = now_s - self._waiting_since_s >= self._limit_s
        if is_over and self._is_waiting:
            log.error(
                "revokes_not_received",
                for_s=self._limit_s,
                meaning="Celery's revoke does not reach this worker; check the log of its connection to the broker",
            )
        return is_over
