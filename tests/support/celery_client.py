"""A user's Celery application without shiwu's code, which closes all its connections."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from celery import Celery


@contextmanager
def celery_client(url: str, *, has_results: bool = True) -> Iterator[Celery]:
    """A producer's application on the Redis at `url`.

    Celery's results unsubscribe when they are collected, and try that for 20 s where their Redis is gone. A result
    that is still held at the end must find no subscription.
    """
    app = Celery("application", broker=url, backend=url if has_results else None, set_as_current=False)
    try:
        yield app
    finally:
        gc.collect()
        if has_results:
            app.backend.result_consumer.stop()
            app.backend.result_consumer._pubsub = None
        app.close()
