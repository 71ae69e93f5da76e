"""Prometheus metrics of `shiwu sweep`: the sizes of the queues where no worker runs.

Importing this module needs prometheus-client, the extra `metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shiwu.broker.queue_metrics import QueueCollector, QueueNumbers
from shiwu.broker.queue_stats import QueueState


class SweepMetrics:
    """The metrics that a sweep exports. Thread-safe.

    Args:
        expected_workers: how many workers should run at all times; 0 if they may be scaled to zero.
    """

    def __init__(self, *, expected_workers: int) -> None:
        self.registry = registry = CollectorRegistry()
        self._queues = QueueCollector()
        self._dropped = _Number(
            CounterMetricFamily, "shiwu_results_dropped", "Answers that left the results stream unacknowledged."
        )
        self._workers = _Number(GaugeMetricFamily, "shiwu_workers", "Workers seen in the last ten seconds.")
        for collector in (self._queues, self._dropped, self._workers):
            registry.register(collector)
        self._redis_up = Gauge("shiwu_redis_up", "1 while Redis answers this process.", registry=registry)
        expected = Gauge("shiwu_workers_expected", "Workers that should run at all times.", registry=registry)
        expected.set(expected_workers)
        self._last_round = Gauge(
            "shiwu_sweep_last_round_timestamp_seconds",
            "When the sweep last completed a round, in seconds since 1970.",
            registry=registry,
        )

    def swept(self) -> None:
        """Record that a round was completed."""
        self._redis_up.set(1)
        self._last_round.set(time.time())

    def queues(self, state: QueueState) -> None:
        """Record the sizes of the queues and the number of workers."""
        self._queues.update(
            QueueNumbers(
                waiting=state.waiting,
                claimed=state.claimed,
                oldest_age_s=state.oldest_age_s,
                delayed=state.delayed,
                dead=state.dead,
            )
        )
        self._dropped.value = state.counters.get("results_dropped", 0)
        self._workers.value = len(state.workers)

    def redis_unreachable(self) -> None:
        """Record that Redis is unavailable: queue sizes are not exported until it answers."""
        self._queues.forget()
        self._workers.value = None
        self._redis_up.set(0)


class _Number(Collector):
    """A metric with one number from Redis; exports nothing while the number is unknown."""

    def __init__(self, family: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str) -> None:
        self._family, self._name, self._text = family, name, text
        self.value: int | None = None

    def describe(self) -> Iterator[Metric]:
        """The name, for the registry's check that no two collectors share one."""
        yield self._family(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        """The newest number, if it is known."""
        if self.value is not None:
            yield self._family(self._name, self._text, value=self.value)
