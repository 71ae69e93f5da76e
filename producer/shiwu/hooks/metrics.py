"""Prometheus metrics of `shiwu-hooks`; docs/webhooks.md lists them. Thread-safe."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shiwu.hooks.delivery_queue import EndpointHealth
from shiwu.hooks.endpoints import Endpoint

SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)


class HooksMetrics:
    """What one process exports. All URLs of requests share the label `url`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._lock = Lock()
        self._paused_shards: set[int | None] = set()
        self.answers = Counter(
            "shiwu_hooks_answers", "Answers read from the stream, by what happened.", ["outcome"], registry=registry
        )
        self._tries = Counter("shiwu_hooks_tries", "Tries of deliveries.", ["endpoint", "outcome"], registry=registry)
        self._seconds = Histogram(
            "shiwu_hooks_try_seconds", "Time of one try.", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.in_flight = Gauge("shiwu_hooks_in_flight", "Tries that this process makes now.", registry=registry)
        self._pending = Gauge(
            "shiwu_hooks_pending", "Deliveries that wait, by endpoint.", ["endpoint"], registry=registry
        )
        self._failures = Gauge(
            "shiwu_hooks_endpoint_failures", "Failures in a row, by endpoint.", ["endpoint"], registry=registry
        )
        self._disabled = Gauge(
            "shiwu_hooks_endpoint_disabled", "1 where an endpoint answered 410.", ["endpoint"], registry=registry
        )
        self._dead = Gauge("shiwu_hooks_dead", "Deliveries that were given up.", registry=registry)
        self._paused = Gauge(
            "shiwu_hooks_reading_paused", "1 while a full backlog pauses the reading of answers.", registry=registry
        )
        self.redis_up = Gauge("shiwu_redis_up", "1 while Redis answers this process.", registry=registry)

    def tried(self, endpoint: Endpoint, outcome: str, *, duration_s: float) -> None:
        """Count one try: delivered, retried or dead."""
        self._tries.labels(endpoint.metrics_label, outcome).inc()
        self._seconds.labels(endpoint.metrics_label).observe(duration_s)

    def paused(self, *, is_paused: bool, shard: int | None = None) -> None:
        """Record whether the reading of answers, or of those of one shard, is paused."""
        with self._lock:
            (self._paused_shards.add if is_paused else self._paused_shards.discard)(shard)
            self._paused.set(bool(self._paused_shards))

    def counted(self, *, pending: Mapping[str, int], health: Mapping[str, EndpointHealth], dead: int) -> None:
        """Record what was counted in Redis, for the endpoints of the file."""
        for name, count in pending.items():
            state = health.get(name, EndpointHealth())
            self._pending.labels(name).set(count)
            self._failures.labels(name).set(state.failures)
            self._disabled.labels(name).set(state.disabled_ms > 0)
        self._dead.set(dead)
        self.redis_up.set(1)
