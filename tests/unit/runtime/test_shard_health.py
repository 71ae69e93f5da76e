"""Which shards are away, as the threads of a worker report it."""

from __future__ import annotations

import threading

import redis
from structlog.testing import capture_logs

from shiwu_worker.runtime.shard_health import ShardBackoff, ShardHealth

GONE = redis.ConnectionError("gone")


def test_shard_is_away_until_all_threads_get_replies() -> None:
    """It is logged once, whichever thread fails next."""
    changes: list[tuple[int, bool]] = []
    health = ShardHealth(3, on_change=lambda shard, is_away: changes.append((shard, is_away)))
    with capture_logs() as logs:
        health.failed(1, "claim", GONE)
        health.failed(1, "commit", GONE)
        health.succeeded(1, "claim")
        assert (health.away, health.is_away(1), health.is_away(0)) == (1, True, False)
        health.succeeded(1, "commit")
        health.succeeded(1, "commit")
    assert health.away == 0
    assert changes == [(1, True), (1, False)]
    assert [(line["event"], line["shard"]) for line in logs] == [("shard_away", 1), ("shard_back", 1)]


def test_backoff_reports_instead_of_logging() -> None:
    """Success without an earlier failure reports nothing."""
    health, closed = ShardHealth(2), threading.Event()
    closed.set()
    waits: list[redis.RedisError] = []
    backoff = ShardBackoff("claim", shard=1, health=health, on_wait=waits.append)
    backoff.reset()
    with capture_logs() as logs:
        backoff.wait(GONE, closed)
        assert health.is_away(1)
        backoff.wait(GONE, closed)
        backoff.reset()
    assert not health.is_away(1)
    assert waits == [GONE, GONE]
    assert [line["event"] for line in logs] == ["shard_away", "shard_back"]
