"""The thread that keeps our leases alive, looks after jobs of the dead, and shows that we live.

A worker that is stuck does none of it: its leases end, other workers take its jobs, and its alive file grows old.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis import RedisError

from shiwu.broker.maintenance import Maintenance, MaintenanceReport
from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.runtime.progress import LoadReport, Progress
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue

log: Any = structlog.get_logger()
TICK_S: Final = 1.0
CHUNK_SIZE: Final = 500
LOAD_EVERY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class HeartbeatHooks:
    """Where the heartbeat looks, and whom it tells.

    `held` gives the ids whose leases are ours to renew, `alive` touches the file that probes look at, `suspects` wakes
    the claimer for work that no lane shows.
    """

    held: Callable[[], Sequence[str]]
    alive: Callable[[], None]
    suspects: Callable[[], None]
    load: Callable[[], LoadReport] | None = None
    """Where the time went since it was asked last."""
    redis: Callable[[bool], None] = lambda _: None
    """Told at each tick whether Redis answered."""
    renewed: Callable[[int], None] = lambda _: None
    reaped: Callable[[int], None] = lambda _: None


class Heartbeat:
    """Ticks once a second from `start` to `close`.

    Args:
        lease_s: leases are renewed every third of it.
        stuck_s: without progress for this long, while there is work, the worker counts as hung.
        on_fatal: called when the thread ends by a defect: a worker that claims and does not renew is worse than none.
    """

    def __init__(
        self,
        lease_queue: LeaseQueue,
        maintenance: Maintenance,
        *,
        lease_s: float,
        stuck_s: Callable[[], float],
        progress: Progress,
        hooks: HeartbeatHooks,
        backoff: RedisBackoff,
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self._lease_queue = lease_queue
        self._maintenance = maintenance
        self._renew_every_s = lease_s / 3
        self._renewed_s = time.monotonic()
        self._stuck_s = stuck_s
        self._said_stuck_s = 0.0
        self._told_load_s = time.monotonic()
        self._progress = progress
        self._hooks = hooks
        self._backoff = backoff
        self._on_fatal = on_fatal
        self._tick_s = min(TICK_S, lease_s / 6)
        self._seen = MaintenanceReport()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start ticking."""
        self._thread.start()

    def close(self) -> None:
        """Stop; leases that were not given back end by themselves."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            self._beat()
        except Exception as error:  # border: a worker without a heartbeat must not go on
            log.exception("thread_failed", thread="heartbeat")
            self._on_fatal(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))

    def _beat(self) -> None:
        while not self._closed.is_set():
            try:
                if not self._is_stuck():
                    self._hooks.alive()
                    self._renew()
                self._run_maintenance()
                self._tell_load()
                self._backoff.back()
                self._hooks.redis(True)
            except RedisError as error:
                self._hooks.redis(False)
                self._backoff.wait(error, self._closed)
            except OSError as error:
                log.error("alive_file_failed", error=str(error)[:300])
            self._closed.wait(self._tick_s)

    def _is_stuck(self) -> bool:
        """Whether there is work and nothing moves; says so in the log, again and again."""
        idle_s, stuck_s = self._progress.age_s(), self._stuck_s()
        held, waiting = len(self._hooks.held()), self._seen.waiting
        if idle_s <= stuck_s or not (held or waiting):
            return False
        if time.monotonic() - self._said_stuck_s >= stuck_s:
            self._said_stuck_s = time.monotonic()
            log.error(
                "worker_stuck",
                since_s=round(idle_s, 1),
                held=held,
                waiting=waiting,
                meaning="nothing was claimed, encoded or answered; leases are not renewed, this worker counts as dead",
            )
        return True

    def _tell_load(self) -> None:
        """Say now and then what limits this worker, where it has worked at all."""
        if self._hooks.load is None or time.monotonic() - self._told_load_s < LOAD_EVERY_S:
            return
        self._told_load_s = time.monotonic()
        load = self._hooks.load()
        if load.pictures:
            rate, batch = load.pictures / load.seconds, load.pictures / load.batches
            log.info("load", limit=load.limit, pictures_per_s=round(rate, 1), batch=round(batch, 1), **asdict(load))

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_s < self._renew_every_s:
            return
        held = self._hooks.held()
        lost = self._lease_queue.renew(held)
        self._renewed_s = time.monotonic()
        self._hooks.renewed(len(held) - len(lost))
        if lost:
            log.warning("leases_lost", jobs=len(lost), ids=lost[:10])

    def _run_maintenance(self) -> None:
        """Portion by portion, so that no script holds the server for long, until nothing is left."""
        while True:
            # An idle worker claims in vain every few seconds, which is progress: the lanes matter when even that ends.
            is_quiet = self._progress.age_s() > self._stuck_s() / 2
            self._seen = seen = self._maintenance.run_once(limit=CHUNK_SIZE, count_waiting=is_quiet)
            if seen.reaped:
                self._hooks.reaped(seen.reaped)
                log.warning("jobs_reaped", jobs=seen.reaped)
            if seen.out_of_time:
                log.warning("jobs_out_of_time", jobs=seen.out_of_time)
            if seen.quarantined:
                self._hooks.suspects()
            if max(seen.reaped, seen.promoted, seen.out_of_time) < CHUNK_SIZE:
                break
        for group, lost in self._maintenance.trim_if_long(seen).items():
            log.warning(
                "results_dropped", group=group, entries=lost, meaning="this consumer group had not acknowledged them"
            )
