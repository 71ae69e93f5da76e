"""The thread that keeps our leases alive, looks after jobs of the dead, and shows that we live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis import RedisError

if TYPE_CHECKING:
    from shiwu_worker.settle import Away
    from shiwu_worker.stages.claim import Claims

log: Any = structlog.get_logger()
TICK_S: Final = 1.0
TENDED_AT_ONCE: Final = 500


class Heartbeat:
    """Ticks once a second from `start` to `close`.

    Args:
        held: ids of the jobs whose leases are renewed, every third of a lease.
        alive: called each tick; touches the file that probes look at.
    """

    def __init__(
        self,
        claims: Claims,
        *,
        lease_s: float,
        held: Callable[[], Sequence[str]],
        alive: Callable[[], None],
        away: Away,
    ) -> None:
        self._claims = claims
        self._renew_every_s = lease_s / 3
        self._held = held
        self._alive = alive
        self._away = away
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start ticking."""
        self._thread.start()

    def close(self) -> None:
        """Stop; leases that were not given back end by themselves."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _tend(self) -> None:
        """Portion by portion, so that no script holds the server for long, until nothing is left."""
        while True:
            tended = self._claims.tend(most=TENDED_AT_ONCE)
            if tended.reaped:
                log.warning("jobs_reaped", jobs=tended.reaped)
            if max(tended.reaped, tended.promoted) < TENDED_AT_ONCE:
                return

    def _run(self) -> None:
        renewed_s = time.monotonic()
        while not self._closed.is_set():
            try:
                self._alive()
                if time.monotonic() - renewed_s >= self._renew_every_s:
                    renewed_s = time.monotonic()
                    if lost := self._claims.renew(self._held()):
                        log.warning("leases_lost", jobs=len(lost), ids=lost[:10])
                self._tend()
                self._away.back()
            except RedisError as error:
                self._away.wait(error, self._closed)
            except OSError as error:
                log.error("alive_file_failed", error=str(error)[:300])
            self._closed.wait(TICK_S)
