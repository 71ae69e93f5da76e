"""Chooses the form of the marks of answered ids, where the operator leaves it to the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis

from shiwu.broker.migration import OLD_RETENTION
from shiwu.contract import RETENTION
from shiwu_worker.service.factories import connect

if TYPE_CHECKING:
    from shiwu_worker.config.settings import Settings


def choose_marks(settings: Settings) -> Settings:
    """The settings with `both` or `hashes` in the place of `auto`.

    Every worker of every version publishes its limits, and they are never deleted. So a database without limits has
    marks of no earlier version, and where the other workers write hashes only, this one may too. Otherwise, or when
    Redis does not answer, it is `both`, which is right with any database.
    """
    if settings.marks != "auto":
        return settings
    if settings.redis_address.shards:
        # No earlier version uses shards.
        return settings.model_copy(update={"marks": "hashes"})
    with connect(settings, connections=1) as client:
        try:
            # `shiwu migrate` moves the old name; a database without jobs there needs no migration.
            found: Any = client.hgetall(RETENTION) or client.hgetall(OLD_RETENTION)
        except redis.RedisError:
            return settings.model_copy(update={"marks": "both"})
    is_without_old_marks = b"result_ttl_s" not in found or found.get(b"old_marks") == b"0"
    return settings.model_copy(update={"marks": "hashes" if is_without_old_marks else "both"})
