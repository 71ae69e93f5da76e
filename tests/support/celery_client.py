"""A user's Celery application without shiwu's code, which closes all its connections."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from celery import Celery


@contextmanager
def celery_client(
    url: str = "", *, has_results: bool = True, config: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Celery]:
    """A producer's application on the Redis at `url`, or with the addresses of `config`.

    Celery's results unsubscribe when they are collected, and try that for 20 s where their Redis is gone. A result
    that is still held at the end must find no subscription.
    """
    app = Celery("application", broker=url or None, backend=url if has_results and url else None, set_as_current=False)
    app.conf.update(config)
    try:
        yield app
    finally:
        gc.collect()
        if has_results:
            app.backend.result_consumer.stop()
            app.backend.result_consumer._pubsub = None
        app.close()
