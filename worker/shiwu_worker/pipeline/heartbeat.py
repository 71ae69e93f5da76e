"""Heartbeat: renews this worker's leases, does maintenance, and touches the liveness file.

A worker that is stuck renews and touches nothing: its leases expire, and other workers take its jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import structlog

from shiwu.broker.maintenance import MAX_ROUNDS, Maintenance, MaintenanceReport
from shiwu.broker.redis_errors import info_of
from shiwu_worker.errors import FatalError
from shiwu_worker.runtime.duties import Duties, Duty
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.runtime.progress import LoadMeter, Progress
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue

log: FilteringBoundLogger = structlog.get_logger()
TICK_S: Final = 1.0
CHUNK_SIZE: Final = 500
"""Jobs that one script of the maintenance touches at most, so that none blocks the server for long."""
LOAD_LOG_INTERVAL_S: Final = 30.0
FOREIGN_INTERVAL_S: Final = 10.0
"""How often the types of all keys are checked while no duty fails."""
CLOSE_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ShardDuties:
    """What the heartbeat of one shard does in its own way."""

    index: int
    ids: Callable[[], list[str]]
    """The jobs whose leases it renews."""
    report_redis: Callable[[bool], None]
    """Called at each tick with whether Redis answered."""
    waiting: dict[int, int]
    """Shard → messages in its lanes, as the last maintenance counted them; shared by all shards."""
    note_worker: Callable[[], None] = lambda: None
    """Called at each tick, to tell the shard that this worker runs; may ask Redis."""
    is_watched: Callable[[], bool] = lambda: True
    """Whether this worker does the maintenance of the shard."""


def _one_server(in_flight: Collection[str], observer: PipelineObserver) -> ShardDuties:
    return ShardDuties(
        index=0,
        ids=lambda: list(in_flight),
        report_redis=lambda is_available: observer.redis_available(available=is_available),
        waiting={},
    )


class Heartbeat:
    """A thread that ticks once a second from `start` to `close`.

    With shards, each has one; that of the first shard also reports what concerns the whole worker.

    Args:
        lease_s: leases are renewed every third of it.
        in_flight: ids of all jobs in flight.
        stuck_s: without progress for this long, while there is work, the worker counts as stuck.
        on_quarantine: called when quarantined jobs wait, which no lane shows; must not block.
        publish: called at each tick, to tell the state of this worker; may ask Redis.
        shard: what differs where there are shards.
        on_fatal: called when the thread ends by a defect: a worker must not claim jobs and not renew their leases.
    """

    def __init__(
        self,
        lease_queue: LeaseQueue,
        maintenance: Maintenance,
        *,
        lease_s: float,
        in_flight: Collection[str],
        progress: Progress,
        meter: LoadMeter,
        stuck_s: Callable[[], float],
        on_quarantine: Callable[[], None],
        observer: PipelineObserver,
        backoff: RedisBackoff,
        on_fatal: Callable[[FatalError], None],
        publish: Callable[[], None] = lambda: None,
        shard: ShardDuties | None = None,
    ) -> None:
        self._shard = shard or _one_server(in_flight, observer)
        is_first = self._shard.index == 0
        self._lease_queue = lease_queue
        self._maintenance = maintenance
        self._in_flight = in_flight
        self._progress = progress
        self._meter = meter
        self._stuck_s = stuck_s
        self._on_quarantine = on_quarantine
        self._observer = observer
        self._backoff = backoff
        self._tick_s = min(TICK_S, lease_s / 6)
        self._renew_interval_s = lease_s / 3
        self._renewed_s = self._load_logged_s = time.monotonic()
        self._stuck_logged_s = 0.0
        self._foreign_due_s = 0.0
        self._stream_report = MaintenanceReport()
        self._duties = Duties(
            [
                Duty("foreign_values", self._move_foreign),
                Duty("leases", self._prove_progress, is_vital=True),
                Duty("watchers", self._shard.note_worker),
                Duty("maintenance", self._run_maintenance),
                Duty("trim", self._trim),
                *([Duty("load_log", self._log_load), Duty("worker_state", publish)] if is_first else []),
            ],
            on_failed=self._on_duty_failed,
        )
        self._closed = threading.Event()
        name = "heartbeat" if is_first else f"heartbeat-{self._shard.index}"
        self.thread = ServiceThread(name, self._run, on_fatal=on_fatal, stop=self._closed.set)

    def start(self) -> None:
        """Start ticking."""
        self.thread.start()

    def close(self) -> None:
        """Stop. Leases of jobs that were not released expire by themselves."""
        self.thread.close(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            error = self._duties.run()
            # A server that refuses one command has answered.
            self._shard.report_redis(error is None or info_of(error).is_about_command)
            if error is None:
                self._backoff.reset()
            else:
                self._backoff.wait(error, self._closed)
            self._closed.wait(self._tick_s)

    def _prove_progress(self) -> None:
        """Touch the liveness file and renew the leases, unless the worker is stuck."""
        if not self._is_stuck():
            self._observer.alive()
            self._renew()

    def _move_foreign(self) -> None:
        """First of all duties: a key of a wrong type would make the others fail. It is one command for each key."""
        if time.monotonic() < self._foreign_due_s or not self._shard.is_watched():
            return
        self._foreign_due_s = time.monotonic() + FOREIGN_INTERVAL_S
        if foreign := self._maintenance.move_foreign():
            self._observer.foreign_moved(len(foreign))
        for value in foreign:
            log.error(
                "foreign_value_moved",
                key=value.key,
                type=value.type,
                moved_to=value.moved_to,
                meaning="another program wrote it; give each program its own Redis user (docs/redis-acl.conf)",
            )

    def _on_duty_failed(self, name: str) -> None:
        self._foreign_due_s = 0.0  # a key of a wrong type may be the cause
        self._observer.duty_failed(name)

    def _is_stuck(self) -> bool:
        """Whether there is work and nothing makes progress; logged every `stuck_s`."""
        idle_s, stuck_s = self._progress.age_s(), self._stuck_s()
        held, waiting = len(self._in_flight), sum(self._shard.waiting.values())
        if idle_s <= stuck_s or not (held or waiting):
            return False
        if self._shard.index == 0 and time.monotonic() - self._stuck_logged_s >= stuck_s:
            self._stuck_logged_s = time.monotonic()
            log.error(
                "worker_stuck",
                since_s=round(idle_s, 1),
                held=held,
                waiting=waiting,
                meaning="nothing was claimed, encoded or answered; leases are not renewed, this worker counts as dead",
            )
        return True

    def _log_load(self) -> None:
        """Log every 30 s what limits this worker, if it encoded anything in that time."""
        if time.monotonic() - self._load_logged_s < LOAD_LOG_INTERVAL_S:
            return
        self._load_logged_s = time.monotonic()
        load = self._meter.read()
        self._observer.load_measured(load)
        if load.pictures:
            rate, batch = load.pictures / load.seconds, load.pictures / load.batches
            log.info("load", limit=load.limit, pictures_per_s=round(rate, 1), batch=round(batch, 1), **asdict(load))

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_s < self._renew_interval_s:
            return
        held = self._shard.ids()
        lost = self._lease_queue.renew(held)
        self._renewed_s = time.monotonic()
        self._observer.leases_renewed(len(held) - len(lost))
        if lost:
            log.warning("leases_lost", jobs=len(lost), ids=lost[:10])

    def _run_maintenance(self) -> None:
        """One chunk after another, until nothing is left to do."""
        # An idle worker looks for jobs every few seconds, which is progress. Lanes are counted when even that ends.
        is_quiet = self._progress.age_s() > self._stuck_s() / 2
        if not (is_quiet or self._shard.is_watched()):
            self._shard.waiting[self._shard.index], self._stream_report = 0, MaintenanceReport()
            return
        for _ in range(MAX_ROUNDS):
            report = self._maintenance.run_once(limit=CHUNK_SIZE, count_waiting=is_quiet)
            self._shard.waiting[self._shard.index], self._stream_report = report.waiting, report
            self._report(report)
            if not report.is_full:
                break

    def _trim(self) -> None:
        for group, lost in self._maintenance.trim_if_long(self._stream_report).items():
            log.warning(
                "results_dropped", group=group, entries=lost, meaning="this consumer group had not acknowledged them"
            )

    def _report(self, report: MaintenanceReport) -> None:
        if report.reaped:
            self._observer.jobs_reaped(report.reaped)
            log.warning("jobs_reaped", jobs=report.reaped)
        if report.out_of_time:
            log.warning("jobs_out_of_time", jobs=report.out_of_time)
        if report.quarantined:
            self._on_quarantine()
