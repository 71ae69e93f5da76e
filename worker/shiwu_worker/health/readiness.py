"""When a worker is ready: its claims succeed, and what Celery's clients broadcast to workers reaches it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

log: Any = structlog.get_logger()


class Readiness:
    """Thread-safe; `on_change` is called under its lock, by the thread that brings the change about.

    Args:
        revoke_wait_s: a worker that claims and hears no broadcasts is ready all the same after so long, and the log
            says what it misses. 0: hearing does not matter.
    """

    def __init__(self, *, on_change: Callable[[bool], None], revoke_wait_s: float) -> None:
        self._on_change = on_change
        self._limit_s = revoke_wait_s
        self._lock = threading.Lock()
        self._is_claiming = self._is_receiving = self._is_ready = False
        self._waiting_since_s: float | None = None

    def claiming(self, *, active: bool) -> None:
        """Claims succeed, or have ended."""
        with self._lock:
            self._is_claiming = active
            self._update()

    def receiving_revokes(self, *, active: bool) -> None:
        """Broadcasts are heard, or not."""
        with self._lock:
            self._is_receiving = active
            self._update()

    def check_limit(self) -> None:
        """Notice that the limit has passed."""
        with self._lock:
            self._update()

    def is_waiting_for_revokes(self) -> bool:
        """Whether the worker is not ready because it does not hear broadcasts yet."""
        return self._is_claiming and not self._is_ready

    def _update(self) -> None:
        is_ready = self._is_claiming and (self._is_receiving or self._is_given_up())
        if not self._is_claiming or self._is_receiving:
            self._waiting_since_s = None
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._on_change(is_ready)

    def _is_given_up(self) -> bool:
        now_s = time.monotonic()
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        is_over = now_s - self._waiting_since_s >= self._limit_s
        if is_over and self._limit_s and not self._is_ready:
            log.error(
                "revokes_not_received",
                for_s=self._limit_s,
                meaning="Celery's revoke does not reach this worker; see what its connection to the broker says",
            )
        return is_over
