"""Duties of a periodic thread: each runs by itself, so that the failure of one does not skip the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from redis import RedisError

from shiwu.broker.redis_errors import classify, info_of
from shiwu_worker.errors import FatalError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()
LOG_INTERVAL_S: Final = 30.0
"""How often a duty that goes on failing is logged."""


@dataclass(frozen=True, slots=True)
class Duty:
    """One thing that a periodic thread does in each round."""

    name: str
    run: Callable[[], None]
    is_vital: bool = False
    """Whether the process must not go on without it: an error that is not of Redis or a file is then raised."""


class Duties:
    """Runs duties in their order. Used by one thread.

    A duty that fails is logged as `duty_failed` and tried again in the next round. When Redis as a whole does not
    answer, the rest of the round is skipped, because each further command would wait for its time-out.

    Args:
        on_failed: called with the name of a duty at each failure; must not raise or block.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        duties: Sequence[Duty],
        *,
        on_failed: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._duties = duties
        self._on_failed = on_failed
        self._clock = clock
        self._logged_s: dict[str, float] = {}
        """Name of each duty that fails → when that was logged last."""

    def run(self) -> RedisError | None:
        """Run each duty once; return the error for which the thread should pause, if any.

        That is the error of a Redis that does not answer, or one with which Redis refuses a vital duty.

        Raises:
            FatalError: raised by a duty.
            Exception: an unknown error of a vital duty.
        """
        refused: RedisError | None = None
        for duty in self._duties:
            try:
                duty.run()
            except FatalError:
                raise
            except RedisError as error:
                if not info_of(error).is_about_command:
                    return error
                self._failed(duty, error)
                if duty.is_vital:
                    refused = refused or error
            except OSError as error:
                self._failed(duty, error)
            except Exception as error:  # border: a defect of one duty must not keep the worker from the others
                if duty.is_vital:
                    raise
                self._failed(duty, error)
            else:
                if self._logged_s.pop(duty.name, None) is not None:
                    log.info("duty_recovered", duty=duty.name)
        return refused

    def _failed(self, duty: Duty, error: Exception) -> None:
        self._on_failed(duty.name)
        logged_s, now_s = self._logged_s.get(duty.name), self._clock()
        if logged_s is not None and now_s - logged_s < LOG_INTERVAL_S:
            return
        self._logged_s[duty.name] = now_s
        fields = (
            {"code": classify(error).value, "remedy": info_of(error).remedy} if isinstance(error, RedisError) else {}
        )
        is_known = isinstance(error, RedisError | OSError)
        log.error(
            "duty_failed",
            duty=duty.name,
            kind=type(error).__name__,
            error=str(error)[:300],
            exc_info=not is_known,
            **fields,
        )
