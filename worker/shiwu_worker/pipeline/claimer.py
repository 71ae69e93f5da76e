"""Claim loop: claims as many jobs as there is room for, and waits for messages when the lanes are empty."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from redis import RedisError

from shiwu.broker.redis_errors import explain, info_of
from shiwu.contract import Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import open_job

if TYPE_CHECKING:
    from datetime import tzinfo

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.pipeline.in_flight import InFlightJobs
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.runtime.progress import LoadMeter, Progress
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue
    from shiwu_worker.stages.claim.notifier import LaneNotifier

IDLE_WAIT_S: Final = 5.0
"""Longest wait for room or for a message before the loop checks again."""


class Claimer:
    """The loop of the claim thread, and whether its claims succeed.

    Args:
        zone: time zone of an eta or expires that names none.
    """

    def __init__(
        self,
        lease_queue: LeaseQueue,
        notifier: LaneNotifier,
        in_flight: InFlightJobs,
        *,
        zone: tzinfo,
        backoff: RedisBackoff,
        progress: Progress,
        meter: LoadMeter,
        observer: PipelineObserver,
    ) -> None:
        self._lease_queue = lease_queue
        self._notifier = notifier
        self._in_flight = in_flight
        self._zone = zone
        self._backoff = backoff
        self._progress = progress
        self._meter = meter
        self._observer = observer
        self._closing = threading.Event()
        self._has_claimed = self._is_claiming = False

    def run(self, on_claimed: Callable[[Sequence[Job]], None]) -> None:
        """Claim jobs until `close`, read their messages, and pass them on.

        Raises:
            FatalError: with ExitCode.CONFIG, when the first claim fails in a way that does not pass by itself.
        """
        is_quarantine_owner = False
        while not self._closing.is_set():
            room = self._in_flight.wait_for_room(
                is_quarantine_owner=is_quarantine_owner, is_closing=self._closing.is_set, timeout_s=IDLE_WAIT_S
            )
            if not room.total:
                continue
            try:
                if self._lease_queue.has_lost_reply:
                    self._lease_queue.release_lost(self._in_flight)
                    continue
                claimed = self._lease_queue.claim(room.total, bulk_limit=room.bulk, held=self._in_flight)
            except RedisError as error:
                self._wait_for_redis(error)
                continue
            self._has_claimed = True
            self._backoff.reset()
            if self._closing.is_set():
                break
            self.report(active=True)
            if not self._in_flight:
                # With jobs in flight, claims are no progress: only the other threads can end these jobs.
                self._progress.mark()
            is_quarantine_owner = claimed.is_quarantine_owner
            if claimed.jobs:
                on_claimed([open_job(message, zone=self._zone) for message in claimed.jobs])
            elif not is_quarantine_owner:
                self._wait_for_message()
        # While it closes, the worker starts no further job. `stop` tries again at its end.
        with suppress(RedisError):
            self._lease_queue.end(self._in_flight)

    def close(self) -> None:
        """Let `run` end. A claim that is under way is given up."""
        self._closing.set()
        self.report(active=False)
        self._notifier.close()
        self._in_flight.wake()

    def report(self, *, active: bool) -> None:
        """Report a change of whether claims succeed."""
        if active != self._is_claiming:
            self._is_claiming = active
            self._observer.claiming(active=active)

    def _wait_for_redis(self, error: RedisError) -> None:
        self.report(active=False)
        self._notifier.reconnect()
        if not self._has_claimed and info_of(error).ends_start:
            raise FatalError(ExitCode.CONFIG, f"SHIWU_REDIS_URL: {explain(error)}") from error
        self._backoff.wait(error, self._closing)

    def _wait_for_message(self) -> None:
        idle_from_s = time.monotonic()
        # While bulk has no room, its waiting messages must not wake this thread; its room must.
        is_bulk_full = self._in_flight.call_on_bulk_room(self._notifier.notify)
        self._notifier.wait(IDLE_WAIT_S, lanes=(Lane.INTERACTIVE,) if is_bulk_full else tuple(Lane))
        if not self._in_flight:
            self._meter.idle(time.monotonic() - idle_from_s)
