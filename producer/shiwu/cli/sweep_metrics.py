"""Prometheus metrics of `shiwu sweep`: the sizes of the queues where no worker runs.

Importing this module needs prometheus-client, the extra `metrics`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any, Final, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shiwu.broker.queue_metrics import QueueCollector, QueueNumbers
from shiwu.broker.queue_stats import QueueState

MAX_REQUESTS: Final = 8
"""Requests that are served at the same time."""
READ_TIMEOUT_S: Final = 5.0


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


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds and are of no interest."""


class _Server(ThreadingMixIn, WSGIServer):
    """At most `MAX_REQUESTS` requests at a time; further ones wait in the listen queue."""

    daemon_threads = True

    def __init__(self, *args: Any, **named: Any) -> None:
        self._slots = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(*args, **named)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._slots.acquire()  # bounded: each holder has READ_TIMEOUT_S for every read
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()


@contextmanager
def serve(metrics: SweepMetrics, *, host: str, port: int) -> Iterator[int]:
    """Answer HTTP requests with the metrics until the block ends; yields the port, chosen by the system for 0.

    Raises:
        OSError: the address cannot be used.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    server_class = cast("type[WSGIServer]", type("_FamilyServer", (_Server,), {"address_family": family}))
    server = make_server(
        str(address[0]), port, make_wsgi_app(metrics.registry), server_class=server_class, handler_class=_Handler
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=READ_TIMEOUT_S)
