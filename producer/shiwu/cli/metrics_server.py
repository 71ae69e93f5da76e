"""Serves Prometheus metrics over HTTP, for processes that are no worker.

Importing this module needs prometheus-client, the extra `metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, make_wsgi_app

from shiwu.cli.http_server import serve_app


@contextmanager
def serve(registry: CollectorRegistry, *, host: str, port: int) -> Iterator[int]:
    """Answer HTTP requests with the metrics until the block ends; yields the port, chosen by the system for 0.

    Raises:
        OSError: the address cannot be used.
    """
    with serve_app(make_wsgi_app(registry), host=host, port=port) as used:
        yield used
