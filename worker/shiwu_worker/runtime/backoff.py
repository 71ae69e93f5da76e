"""Pauses of a worker's thread while Redis does not answer, and how they are logged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog
from redis import RedisError

from shiwu.broker.backoff import MAX_PAUSE_S, Backoff
from shiwu.broker.redis_errors import REDIS_ERRORS, RedisCode, classify

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()
LOG_INTERVAL_S: Final = 30.0
"""How often an error is logged that does not pass by itself."""


class RedisBackoff:
    """Pauses between tries while Redis does not answer: growing, bounded, and logged. Used by one thread.

    An error that passes by itself is logged once, as `redis_unavailable`. Any other, such as a changed password, is
    logged every 30 s as `redis_refused`, with what to do: the worker keeps its jobs and goes on trying.

    Args:
        where: what the thread does; stands in the log.
        on_wait: called at each pause with the error.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        where: str,
        *,
        on_wait: Callable[[RedisError], None] = lambda _: None,
        max_s: float = MAX_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._where = where
        self._on_wait = on_wait
        self._backoff = Backoff(max_s=max_s)
        self._since_s = 0.0
        self._logged: RedisCode | None = None
        self._logged_s = 0.0

    def wait(self, error: RedisError, stop: threading.Event) -> None:
        """Pause before the next try, or until `stop` is set."""
        if not self._backoff.is_waiting:
            self._since_s = self._clock()
            self._logged = None
        self._log(error)
        self._on_wait(error)
        stop.wait(self._backoff.next_s())

    def reset(self) -> None:
        """Note that a try succeeded; log it after a pause."""
        if self._backoff.is_waiting:
            log.info("redis_available", where=self._where, after_s=round(self._clock() - self._since_s, 3))
            self._backoff.reset()

    def _log(self, error: RedisError) -> None:
        code, now_s = classify(error), self._clock()
        info = REDIS_ERRORS[code]
        if code is self._logged and (info.is_temporary or now_s - self._logged_s < LOG_INTERVAL_S):
            return
        self._logged, self._logged_s = code, now_s
        log.error(
            "redis_unavailable" if info.is_temporary else "redis_refused",
            where=self._where,
            code=code.value,
            kind=type(error).__name__,
            error=str(error)[:300],
            meaning=info.meaning,
            remedy=info.remedy,
        )
