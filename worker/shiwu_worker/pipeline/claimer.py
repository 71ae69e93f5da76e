"""Claim loop: claims as many jobs as there is room for, and waits for messages when the lanes are empty."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from redis import RedisError

from shiwu.broker.redis_errors import explain, info_of
from shiwu.contract import Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import open_job
from shiwu_worker.stages.batch import INTERACTIVE_PAUSE_S

if TYPE_CHECKING:
    from datetime import tzinfo

    from shiwu_worker.jobs.job import Claimed, Job
    from shiwu_worker.pipeline.in_flight import InFlightJobs
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.runtime.progress import LoadMeter, Progress
    from shiwu_worker.stages.claim.lease_queue import ClaimResult

IDLE_WAIT_S: Final = 5.0
"""Longest wait for room or for a message before the loop checks again."""
BULK_READ_S: Final = 0.005
"""While interactive jobs come, a claim takes as many bulk messages as are read in about this time of the CPU."""
_BULK_KEYS: Final = frozenset(Lane.BULK.keys)


class Claims(Protocol):
    """What the loop needs of a `LeaseQueue`, or of `ShardedClaims`."""

    @property
    def has_lost_reply(self) -> bool:
        """Whether the server may have run the last claim, whose reply was lost."""

    def claim(self, limit: int, *, bulk_limit: int | None = None, held: Collection[str] = ()) -> ClaimResult:
        """Claim up to `limit` jobs."""

    def release_lost(self, held: Collection[str]) -> int:
        """Give up earlier claims, and release what the last one brought and is not among `held`."""

    def end(self, held: Collection[str] = ()) -> int:
        """Claim nothing from now on, and do what `release_lost` does."""


class Notifier(Protocol):
    """What the loop needs of a `LaneNotifier`, or of `ShardedClaims`."""

    def wait(self, timeout_s: float, *, lanes: Collection[Lane] = tuple(Lane)) -> bool:
        """Block until one of these lanes may have a message, or until the time-out."""

    def notify(self) -> None:
        """Wake the waiting thread."""

    def reconnect(self) -> None:
        """Use a new connection from the next wait on."""

    def close(self) -> None:
        """Wake the waiting thread; later waits return immediately."""


class Claimer:
    """The loop of the claim thread, and whether its claims succeed.

    Args:
        zone: time zone of an eta or expires that names none.
    """

    def __init__(
        self,
        lease_queue: Claims,
        notifier: Notifier,
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
        self._interactive_s = -math.inf
        """When the last interactive job was claimed, on the monotonic clock."""
        self._bulk_message_s = 0.0
        """CPU time for one bulk message of the last claims. It grows immediately and falls slowly."""

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
                claimed = self._lease_queue.claim(
                    room.total, bulk_limit=self._bulk_limit(room.bulk), held=self._in_flight
                )
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
                self._pass_on(claimed.jobs, on_claimed)
            elif not is_quarantine_owner:
                self._wait_for_message()
        # While it closes, the worker starts no further job. `stop` tries again at its end.
        with suppress(RedisError):
            self._lease_queue.end(self._in_flight)

    def _pass_on(self, claimed: Sequence[Claimed], on_claimed: Callable[[Sequence[Job]], None]) -> None:
        """Read the messages of a claim: interactive ones do not wait until the others are read."""
        bulk = [message for message in claimed if message.key in _BULK_KEYS]
        if len(bulk) < len(claimed):
            self._interactive_s = time.monotonic()
            on_claimed([open_job(message, zone=self._zone) for message in claimed if message.key not in _BULK_KEYS])
        if bulk:
            began_s = time.thread_time()
            on_claimed([open_job(message, zone=self._zone) for message in bulk])
            found_s = (time.thread_time() - began_s) / len(bulk)
            self._bulk_message_s = max(found_s, (found_s + self._bulk_message_s) / 2)

    def _bulk_limit(self, room: int) -> int:
        """How many bulk messages to claim: while they are read, no interactive job is claimed."""
        if self._bulk_message_s <= 0.0 or time.monotonic() - self._interactive_s >= INTERACTIVE_PAUSE_S:
            return room
        return min(room, max(1, int(BULK_READ_S / self._bulk_message_s)))

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
