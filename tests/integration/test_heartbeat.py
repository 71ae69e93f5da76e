"""Leases follow progress: a worker that is stuck loses its jobs, says so, and no longer looks alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from shiwu.contract import CLAIMS, WORKERS
from shiwu_worker.pipeline.heartbeat import Heartbeat, HeartbeatHooks
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import Progress
from tests.support.redis_parts import make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until


def make_heartbeat(
    client: redis.Redis,
    progress: Progress,
    *,
    held: list[str],
    alive: Callable[[], None],
    stuck_s: float,
    **told: Callable[[Any], None],
) -> Heartbeat:
    """The heartbeat of a worker with a lease of 1.2 s."""
    return Heartbeat(
        make_lease_queue(client, "w", lease_s=1.2),
        make_maintenance(client, "w"),
        lease_s=1.2,
        stuck_s=lambda: stuck_s,
        progress=progress,
        hooks=HeartbeatHooks(held=lambda: held, alive=alive, suspects=lambda: None, **told),
        backoff=RedisBackoff("heartbeat"),
        on_fatal=pytest.fail,
    )


def test_a_stuck_worker_loses_its_jobs_and_says_so(redis_client: redis.Redis) -> None:
    """Renewed while there is progress; after that the lease ends, the job goes back, the alive file is not touched."""
    redis_client.lpush("shiwu.bulk", message("job"))
    make_lease_queue(redis_client, "w", lease_s=1.2).claim(1)
    progress, touches = Progress(), []
    counts: dict[str, list[Any]] = {"renewed": [], "reaped": [], "redis": []}
    told = {name: each.append for name, each in counts.items()}
    heartbeat = make_heartbeat(
        redis_client, progress, held=["job"], alive=lambda: touches.append(1), stuck_s=3.0, **told
    )
    with capture_logs() as logs:
        heartbeat.start()
        try:
            wait_until(lambda: len(touches) >= 3, timeout_s=10)
            assert redis_client.hexists(CLAIMS, "job"), "a lease of 1.2 s was not renewed"
            wait_until(lambda: any(line["event"] == "worker_stuck" for line in logs), timeout_s=10)
            wait_until(lambda: not redis_client.hexists(CLAIMS, "job"), timeout_s=10)
            seen = len(touches)
            before = redis_client.zscore(WORKERS, "w")
            wait_until(lambda: redis_client.zscore(WORKERS, "w") != before, timeout_s=10)
            assert len(touches) == seen
            progress.mark()
            wait_until(lambda: len(touches) > seen, timeout_s=10)
        finally:
            heartbeat.close()
    [line] = [line for line in logs if line["event"] == "worker_stuck"]
    assert (line["held"], line["log_level"]) == (1, "error")
    # It held the lease until it stuck; what it lost was not renewed.
    assert sum(counts["renewed"]) >= 5
    assert (counts["reaped"], set(counts["redis"])) == ([1], {True})


def test_messages_that_nobody_claims_are_a_stuck_worker_too(redis_client: redis.Redis) -> None:
    """Nothing is held, a lane is not empty, and nothing moves."""
    redis_client.lpush("shiwu.interactive", message("job"))
    touches: list[int] = []
    heartbeat = make_heartbeat(redis_client, Progress(), held=[], alive=lambda: touches.append(1), stuck_s=1.5)
    with capture_logs() as logs:
        heartbeat.start()
        try:
            wait_until(lambda: any(line["event"] == "worker_stuck" for line in logs), timeout_s=10)
        finally:
            heartbeat.close()
    [line] = [line for line in logs if line["event"] == "worker_stuck"]
    assert (line["held"], line["waiting"]) == (0, 1)


def test_an_idle_worker_is_not_stuck(redis_client: redis.Redis) -> None:
    """No work, no progress, no alarm."""
    touches: list[int] = []
    heartbeat = make_heartbeat(redis_client, Progress(), held=[], alive=lambda: touches.append(1), stuck_s=0.1)
    heartbeat.start()
    try:
        wait_until(lambda: len(touches) >= 3, timeout_s=10)
    finally:
        heartbeat.close()
