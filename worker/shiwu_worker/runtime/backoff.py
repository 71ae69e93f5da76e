"""Growing pauses between attempts while Redis does not answer, with log lines that say what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis import RedisError

from shiwu.broker.redis_errors import REDIS_ERRORS, RedisCode, classify

log: Any = structlog.get_logger()

LOG_AGAIN_S: Final = 30.0


class RedisBackoff:
    """Pauses between tries while Redis is away: growing, bounded, and said in the log.

    An error that passes by itself is logged once, as `redis_unavailable`. One that does not, such as a changed
    password, is logged repeatedly as `redis_refused` with the remedy; the worker keeps its jobs and goes on trying.

    Args:
        on_wait: called at each pause with the error; Redis' absence is no hang of ours.
    """

    def __init__(
        self,
        where: str,
        *,
        on_wait: Callable[[RedisError], None] = lambda _: None,
        first_s: float = 0.1,
        longest_s: float = 2.0,
    ) -> None:
        self._where = where
        self._on_wait = on_wait
        self._first_s = first_s
        self._longest_s = longest_s
        self._pause_s = 0.0
        self._since_s = 0.0
        self._said: RedisCode | None = None
        self._said_s = 0.0

    def wait(self, error: RedisError, stop: threading.Event) -> None:
        """Pause before the next try, or until `stop` is set."""
        if not self._pause_s:
            self._since_s = time.monotonic()
            self._said = None
        self._say(error)
        self._on_wait(error)
        self._pause_s = min(self._longest_s, self._pause_s * 2 or self._first_s)
        stop.wait(self._pause_s)

    def _say(self, error: RedisError) -> None:
        code, now_s = classify(error), time.monotonic()
        info = REDIS_ERRORS[code]
        if code is self._said and (info.passes or now_s - self._said_s < LOG_AGAIN_S):
            return
        self._said, self._said_s = code, now_s
        log.error(
            "redis_unavailable" if info.passes else "redis_refused",
            where=self._where,
            code=code.value,
            kind=type(error).__name__,
            error=str(error)[:300],
            meaning=info.meaning,
            remedy=info.remedy,
        )

    def back(self) -> None:
        """Say that a try succeeded."""
        if self._pause_s:
            log.info("redis_available", where=self._where, after_s=round(time.monotonic() - self._since_s, 3))
            self._pause_s = 0.0
