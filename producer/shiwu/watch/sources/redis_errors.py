"""Errors of the Redis that holds bucket events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from shiwu.broker.redis_errors import explain, info_of
from shiwu.watch.sources.base import SourceUnavailable, SourceWrong


@contextmanager
def source_errors(name: str) -> Iterator[None]:
    """Raise errors of Redis as errors of the source."""
    try:
        yield
    except redis.RedisError as error:
        kind = SourceUnavailable if info_of(error).is_temporary else SourceWrong
        raise kind(f"{name}: {explain(error)}") from error
