"""Prometheus metrics of `shiwu watch`; docs/events.md lists them. Thread-safe.

Importing this module needs prometheus-client.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shiwu.watch.intake import OUTCOMES, Plan

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)


class WatchMetrics:
    """What one watcher exports."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._events = Counter("shiwu_watch_events", "Events, by what became of them.", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._events.labels(outcome)
        self._messages = Counter("shiwu_watch_messages", "Messages that were taken and dealt with.", registry=registry)
        self._seconds = Histogram(
            "shiwu_watch_portion_seconds",
            "Time from taking a portion to removing it, waits for a full lane included.",
            buckets=SECONDS,
            registry=registry,
        )
        self._refused = Counter(
            "shiwu_watch_requests_refused", "HTTP requests that were refused, by status.", ["status"], registry=registry
        )
        self._waiting = Gauge(
            "shiwu_watch_waiting", "1 while jobs wait because a lane is full or Redis is away.", registry=registry
        )
        self._source_up = Gauge("shiwu_watch_source_up", "1 while the source of events answers.", registry=registry)
        self._last = Gauge(
            "shiwu_watch_last_portion_timestamp_seconds",
            "When a portion was last completed, in seconds since 1970.",
            registry=registry,
        )

    def portion(self, *, messages: int, plan: Plan, duration_s: float) -> None:
        """Count a portion."""
        self._messages.inc(messages)
        self._seconds.observe(duration_s)
        self._last.set_to_current_time()
        for outcome, count in plan.counts.items():
            self._events.labels(outcome).inc(count)

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(str(status)).inc()

    def source(self, *, is_up: bool) -> None:
        """Record whether the source answers."""
        self._source_up.set(is_up)

    def waiting(self, *, is_waiting: bool) -> None:
        """Record whether jobs wait."""
        self._waiting.set(is_waiting)
