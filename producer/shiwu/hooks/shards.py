"""Deliveries over the shards of a cluster. A delivery is in the shard of its answer, so it is added in one step there.

Endpoints belong to no shard. What one shard learns of the health of an endpoint is copied to the others, so that an
endpoint that fails, asks for a pause or is gone gets no more tries than on one server.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, Final

import redis

from shiwu.contract import HOOKS_HEALTH
from shiwu.hooks.delivery_queue import (
    COMMON_KEYS,
    DeadDelivery,
    Delivery,
    DeliveryQueue,
    EndpointHealth,
    QueueOptions,
    TryEnd,
    load_script,
    pending_key,
    read_health,
)

SKIP_S: Final = 10.0
"""A shard that was unavailable gets no copies of health for so long, because each would cost a time-out."""


class SharedHealth:
    """Copies the health of endpoints from one shard to the others. Thread-safe.

    Args:
        clients: one for each shard.
    """

    def __init__(self, clients: Sequence[redis.Redis]) -> None:
        self._clients = tuple(clients)
        self._scripts = [load_script(client, "health") for client in clients]
        self._lock = Lock()
        self._away_until_s = [0.0] * len(clients)

    def copy(self, endpoint: str, *, source: int) -> None:
        """Copy what a shard knows. A shard that is unavailable learns it from its own tries.

        Raises:
            redis.RedisError: the shard that knows it is unavailable.
        """
        text: Any = self._clients[source].hget(HOOKS_HEALTH, endpoint)
        if text is None:
            return
        for shard, script in enumerate(self._scripts):
            if shard == source or time.monotonic() < self._away_until_s[shard]:
                continue
            try:
                script(keys=[*COMMON_KEYS, pending_key(endpoint)], args=[endpoint, text])
            except (redis.RedisError, OSError):
                with self._lock:
                    self._away_until_s[shard] = time.monotonic() + SKIP_S


class ShardQueue(DeliveryQueue):
    """The queue of one shard, which tells the others of the health of endpoints. Thread-safe."""

    def __init__(self, client: redis.Redis, options: QueueOptions, *, shard: int, health: SharedHealth) -> None:
        super().__init__(client, options)
        self._shard = shard
        self._shared = health

    def take(self, endpoint: str, *, count: int) -> list[Delivery]:
        """As that of `DeliveryQueue`; a try at an endpoint that fails is the only one in all shards."""
        taken = super().take(endpoint, count=count)
        if taken and self._health_of(endpoint).failures >= self._options.alone_after:
            self._shared.copy(endpoint, source=self._shard)
        return taken

    def _end(self, delivery: Delivery, end: TryEnd) -> None:
        is_news = end.outcome != "delivered"
        if not is_news:
            before = self._health_of(delivery.endpoint)
            is_news = before.failures > 0 or before.not_before_ms > 0
        super()._end(delivery, end)
        if is_news:
            self._shared.copy(delivery.endpoint, source=self._shard)

    def _health_of(self, endpoint: str) -> EndpointHealth:
        text: Any = self._client.hget(HOOKS_HEALTH, endpoint)
        return EndpointHealth() if text is None else read_health(text)


class AllDeliveries:
    """The queues of all shards together, for operators and metrics. Thread-safe.

    Every method may raise `redis.RedisError`: a shard is unavailable; repeating a call is safe.
    """

    def __init__(self, queues: Sequence[DeliveryQueue]) -> None:
        self._queues = tuple(queues)

    def dead(self, *, endpoint: str | None = None, limit: int | None = None) -> Iterator[DeadDelivery]:
        """Yield the dead deliveries of all shards, newest first."""
        found = (queue.dead(endpoint=endpoint, limit=limit) for queue in self._queues)
        return islice(heapq.merge(*found, key=lambda letter: -letter.died_ms), limit)

    def revive(self, deliveries: Sequence[tuple[str, str]], *, endpoints: Sequence[str] = ()) -> int:
        """As that of `DeliveryQueue`. The endpoints are enabled in all shards."""
        return sum(queue.revive(deliveries, endpoints=endpoints) for queue in self._queues)

    def health(self) -> dict[str, EndpointHealth]:
        """The health of every endpoint that has failed, as the shard with its last failure knows it."""
        found: dict[str, EndpointHealth] = {}
        for queue in self._queues:
            for name, state in queue.health().items():
                known = found.get(name, state)
                newer = max(known, state, key=lambda each: each.last_failure_ms)
                found[name] = replace(newer, disabled_ms=max(known.disabled_ms, state.disabled_ms))
        return found

    def pending(self, endpoints: Sequence[str]) -> Mapping[str, int]:
        """How many deliveries wait for each of these endpoints."""
        counts = Counter(dict.fromkeys(endpoints, 0))
        for queue in self._queues:
            counts.update(queue.pending(endpoints))
        return counts

    def endpoints_with_deliveries(self) -> list[str]:
        """Endpoints for which a delivery waits, at most 1000 of each shard."""
        return sorted({name for queue in self._queues for name in queue.endpoints_with_deliveries()})

    def dead_count(self) -> int:
        """How many dead deliveries there are."""
        return sum(queue.dead_count() for queue in self._queues)

    def now_ms(self) -> float:
        """The clock of the first shard, in ms since 1970."""
        return self._queues[0].now_ms()


def open_queues(clients: Sequence[redis.Redis], options: QueueOptions) -> list[DeliveryQueue]:
    """The queue of each shard, with an equal part of what may be kept; the one queue of one server.

    Args:
        clients: one for each shard.
    """
    if len(clients) == 1:
        return [DeliveryQueue(clients[0], options)]
    health = SharedHealth(clients)
    part = replace(options, max_dead=-(-options.max_dead // len(clients)))
    return [ShardQueue(client, part, shard=shard, health=health) for shard, client in enumerate(clients)]
