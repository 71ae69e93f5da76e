"""Takes deliveries that are due, tries them on several threads, and ends each try in Redis."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Final

import redis

from shiwu.client.stream_items import Outage
from shiwu.contract import without_query
from shiwu.hooks.delivery_queue import Delivery, DeliveryQueue
from shiwu.hooks.endpoints import Endpoint
from shiwu.hooks.event_log import EventLog
from shiwu.hooks.metrics import HooksMetrics
from shiwu.hooks.router import Router
from shiwu.hooks.sender import Outcome, Sender
from shiwu.hooks.try_slots import TrySlots

POLL_S: Final = 0.2
SHARD_POLL_S: Final = 1.0
"""The same over shards, of which each is asked."""
JITTER: Final = 0.1
"""Share by which a pause may be longer or shorter."""
THROTTLE_PAUSE_S: Final = 5.0
"""Pause of an overloaded endpoint that asks for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """How deliveries are tried; durations are in seconds."""

    schedule_s: tuple[float, ...]
    """The pause before each try."""
    lease_s: float


class Dispatcher:
    """Tries the deliveries of one shard until it is stopped. `run` belongs to one thread, tries run on others.

    Args:
        slots: those of all shards.
        added: set by others when there may be more to do.
        shard: the index of the shard; None on one server.
    """

    def __init__(
        self,
        deliveries: DeliveryQueue,
        sender: Sender,
        router: Router,
        options: DispatchOptions,
        *,
        slots: TrySlots,
        added: Event,
        log: EventLog,
        metrics: HooksMetrics,
        shard: int | None = None,
    ) -> None:
        self._deliveries = deliveries
        self._sender = sender
        self._router = router
        self._options = options
        self._wake = added
        self._log = log
        self._metrics = metrics
        self._slots = slots
        self._shard = shard
        self._random = random.Random()  # noqa: S311 spreads tries, no secret
        self._failure: Exception | None = None

    def run(self, stop: Event) -> None:
        """Take and try deliveries until `stop`.

        Raises:
            redis.RedisError: an error that time cannot cure.
            Exception: a try ended by a defect.
        """
        outage = Outage(away_s=None, shard=self._shard)
        poll_s = POLL_S if self._shard is None else SHARD_POLL_S
        while not stop.is_set():
            self._wake.clear()
            try:
                is_busy = self._take()
            except (redis.RedisError, OSError) as error:
                self._metrics.redis_up.set(0)
                stop.wait(outage.pause(error).seconds)
                continue
            outage.end()
            if self._failure is not None:
                raise self._failure
            if not is_busy:
                self._wake.wait(poll_s)

    def _take(self) -> bool:
        """Take what is due and has room; return whether anything was taken."""
        is_busy = False
        for key in self._deliveries.due_endpoints(now_ms=self._deliveries.now_ms()):
            if not self._router.is_known(key):
                self._deliveries.take(key, count=0)
            elif room := self._slots.reserve(key, wake=self._wake):
                taken: list[Delivery] = []
                try:
                    taken = self._deliveries.take(key, count=room)
                finally:
                    self._slots.release(key, room - len(taken))
                for delivery in taken:
                    self._slots.submit(partial(self._guarded, delivery))
                is_busy = is_busy or bool(taken)
        return is_busy

    def _guarded(self, delivery: Delivery) -> None:
        self._metrics.in_flight.inc()
        try:
            self._try(delivery)
        except Exception as error:  # noqa: BLE001 the thread of `run` raises it, and so ends the process
            self._failure = error
        finally:
            self._metrics.in_flight.dec()
            self._slots.release(delivery.endpoint, 1)
            self._wake.set()

    def _try(self, delivery: Delivery) -> None:
        began_s = time.monotonic()
        found = self._router.endpoint(delivery.endpoint, delivery.payload.url)
        if found is None:
            # Its endpoint has left the file. The delivery waits for its lease, and at last becomes too old.
            return
        endpoint, url = found
        outcome = self._sender.send(endpoint, delivery_id=delivery.id, url=url, body=delivery.body)
        duration_s = time.monotonic() - began_s
        result, delay_s = self._decide(delivery, outcome)
        self._metrics.tried(endpoint, result, duration_s=duration_s)
        self._end(delivery, outcome, result, delay_s, lease_ends_s=began_s + self._options.lease_s)
        self._tell(endpoint, url, delivery, outcome, result, delay_s=delay_s, duration_s=duration_s)

    def _decide(self, delivery: Delivery, outcome: Outcome) -> tuple[str, float]:
        """Whether a delivery is made, retried after a delay in seconds, or dead."""
        if outcome.is_delivered:
            return "delivered", 0.0
        number = delivery.failed + 1
        if outcome.is_gone or number >= len(self._options.schedule_s):
            return "dead", 0.0
        delay_s = self._options.schedule_s[number] * self._random.uniform(1 - JITTER, 1 + JITTER)
        return "retried", max(delay_s, outcome.retry_after_s or 0.0)

    def _end(self, delivery: Delivery, outcome: Outcome, result: str, delay_s: float, *, lease_ends_s: float) -> None:
        """Tell Redis, for as long as the lease lasts; afterwards the delivery is made again, with the same id."""
        outage = Outage(away_s=max(0.0, lease_ends_s - time.monotonic()))
        pause_s = 0.0
        if outcome.is_throttled:
            pause_s = THROTTLE_PAUSE_S if outcome.retry_after_s is None else outcome.retry_after_s
        while True:
            try:
                if result == "delivered":
                    self._deliveries.delivered(delivery)
                elif result == "dead":
                    # A URL of a request shares its origin with others.
                    is_disabling = outcome.is_gone and delivery.payload.url is None
                    self._deliveries.give_up(delivery, reason=outcome.reason, is_disabling=is_disabling)
                else:
                    self._deliveries.retry(
                        delivery,
                        reason=outcome.reason,
                        delay_s=delay_s,
                        pause_s=pause_s,
                    )
            except (redis.RedisError, OSError) as error:
                try:
                    Event().wait(outage.pause(error).seconds)
                except (redis.RedisError, OSError) as last:
                    self._log.error(
                        "try_not_ended", endpoint=delivery.endpoint, webhook_id=delivery.id, error=str(last)
                    )
                    return
            else:
                return

    def _tell(
        self,
        endpoint: Endpoint,
        url: str,
        delivery: Delivery,
        outcome: Outcome,
        result: str,
        *,
        delay_s: float,
        duration_s: float,
    ) -> None:
        fields = {
            "endpoint": endpoint.key,
            "url": without_query(url) if endpoint.is_from_request else None,
            "webhook_id": delivery.id,
            "answers": delivery.payload.count,
            "attempt": delivery.failed + 1,
            "status": outcome.status,
            "ms": round(duration_s * 1000, 1),
        }
        if result == "delivered":
            self._log.info("delivered", **fields)
        elif result == "retried":
            self._log.warning("delivery_failed", **fields, reason=outcome.reason, retry_in_s=round(delay_s, 1))
        else:
            self._log.error("delivery_dead", **fields, reason=outcome.reason)
