"""Reads answers of the results stream, and adds their deliveries to the queue."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import Final

import redis

from shiwu.client.stream_items import Outage, StreamItem
from shiwu.hooks.delivery_queue import DeliveryQueue, EndpointHealth, NewDelivery
from shiwu.hooks.event_log import EventLog
from shiwu.hooks.metrics import HooksMetrics
from shiwu.hooks.router import Router

PORTION: Final = 200
"""Answers whose deliveries are added in one step."""
LINGER_S: Final = 1.0
"""How long answers wait for others where an endpoint gets several in one body."""
POLL_S: Final = 0.2
FULL_PAUSE_S: Final = 0.5
BUFFERED: Final = 2 * PORTION
"""Answers that are read and not added yet."""
MAX_URL_ORIGINS: Final = 100
"""Origins of URLs in requests for which deliveries may wait at a time."""
URL_SHARE: Final = 10
"""The backlog of an endpoint is this many times that of an origin of URLs in requests."""
BACKLOG_FULL: Final = "backlog_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeOptions:
    """Limits of the intake."""

    group: str
    max_pending: int
    """Deliveries that may wait for one endpoint."""
    alone_after: int
    """Failures in a row from which an endpoint counts as failing."""


class Intake:
    """Moves answers from the stream of one shard into its queue of deliveries. `read` and `add` run in a thread each.

    Args:
        shard: the index of the shard; None on one server.
    """

    def __init__(
        self,
        items: Iterable[StreamItem],
        deliveries: DeliveryQueue,
        router: Router,
        options: IntakeOptions,
        *,
        log: EventLog,
        metrics: HooksMetrics,
        shard: int | None = None,
    ) -> None:
        self._items = items
        self._deliveries = deliveries
        self._router = router
        self._options = options
        self._log = log
        self._metrics = metrics
        self._shard = shard
        self._buffer: queue.Queue[StreamItem] = queue.Queue(BUFFERED)
        self._held: set[str] = set()
        """Entries that are read and not added. An entry may come again later, as after a failover that lost its
        acknowledgement, and is then added again."""
        self.added = Event()
        """Set when deliveries were added."""

    # -------------------------------------------------------------------------------- reading
    def read(self, stop: Event) -> None:
        """Read answers until `stop`; an idle stream is noticed after the time of one read.

        Raises:
            redis.RedisError: an error that time cannot cure.
        """
        for item in self._items:
            if item.entry_id in self._held:  # one that waits long for room comes again
                continue
            self._held.add(item.entry_id)
            while not stop.is_set():
                with suppress(queue.Full):
                    self._buffer.put(item, timeout=POLL_S)
                    break
            if stop.is_set():
                return

    # -------------------------------------------------------------------------------- adding
    def add(self, stop: Event) -> None:
        """Add deliveries until `stop`. Answers that are not added stay unacknowledged, so they are read again.

        Raises:
            redis.RedisError: an error that time cannot cure.
        """
        while not stop.is_set():
            if portion := self._portion():
                self._add(portion, stop)

    def _portion(self) -> list[StreamItem]:
        return list(self._waiting())

    def _waiting(self) -> Iterator[StreamItem]:
        until_s = time.monotonic() + POLL_S
        for number in range(PORTION):
            try:
                yield self._buffer.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                return
            if number == 0:
                until_s = time.monotonic() + (LINGER_S if self._router.is_batching else 0.0)

    def _add(self, portion: Sequence[StreamItem], stop: Event) -> None:
        routed = self._router.route(portion)
        entries = [item.entry_id for item in portion]
        outage = Outage(away_s=None, shard=self._shard)
        while not stop.is_set():
            try:
                deliveries = self._with_room(routed.deliveries)
                if deliveries is not None:
                    self._deliveries.add(deliveries, group=self._options.group, entry_ids=entries)
                    break
            except (redis.RedisError, OSError) as error:
                self._metrics.redis_up.set(0)
                stop.wait(outage.pause(error).seconds)
                continue
            outage.end()
            self._metrics.paused(is_paused=True, shard=self._shard)
            stop.wait(FULL_PAUSE_S)
        else:
            return
        outage.end()
        self._held.difference_update(entries)
        self._metrics.paused(is_paused=False, shard=self._shard)
        self.added.set()
        self._metrics.answers.labels("read").inc(len(portion))
        for item, why in routed.unrouted:
            self._metrics.answers.labels(str(why)).inc()
            self._log.warning("answer_unrouted", id=item.result.id, reason=str(why))

    def _with_room(self, deliveries: Sequence[NewDelivery]) -> Sequence[NewDelivery] | None:
        """The deliveries, those without room as dead ones; None where the reading has to wait.

        It waits for an endpoint of the operator that works, and is only slower than answers come. An endpoint that
        fails, and URLs of requests, hold up no other endpoint.
        """
        names = list(dict.fromkeys(each.endpoint for each in deliveries))
        pending = self._deliveries.pending(names)
        urls = {each.endpoint for each in deliveries if each.payload.url is not None}
        full = {name for name in names if pending[name] >= self._max_pending(is_url=name in urls)}
        full |= self._excess_origins({name for name in urls if not pending[name]})
        if not full:
            return deliveries
        health = self._deliveries.health()
        if any(not self._is_failing(health.get(name)) for name in full - urls):
            return None
        return [replace(each, dead_reason=BACKLOG_FULL) if each.endpoint in full else each for each in deliveries]

    def _max_pending(self, *, is_url: bool) -> int:
        return max(1, self._options.max_pending // URL_SHARE) if is_url else self._options.max_pending

    def _excess_origins(self, new: set[str]) -> set[str]:
        """Of these origins, to which nothing waits yet, those that would be too many."""
        if not new:
            return set()
        waiting = sum(not self._router.is_named(name) for name in self._deliveries.endpoints_with_deliveries())
        return set(sorted(new)[max(0, MAX_URL_ORIGINS - waiting) :])

    def _is_failing(self, health: EndpointHealth | None) -> bool:
        return health is not None and (health.disabled_ms > 0 or health.failures >= self._options.alone_after)
