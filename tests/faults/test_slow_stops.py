"""A worker that stops while Redis is slow or hangs: it ends in the documented time and leaves no claimed jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from shiwu.contract import CLAIMS, Lane
from tests.conftest import StartWorker
from tests.support.fault_proxy import FaultProxy
from tests.support.redis_parts import make_maintenance, message
from tests.support.waiting import wait_until

GRACE_S = 1
REDIS_TIMEOUT_S = 2
DOCUMENTED_S = GRACE_S + 2 * REDIS_TIMEOUT_S + 13
"""As docs/operations.md: two Redis time-outs, 5 s for loaders and callbacks, 3 s for traces, 5 s to spare."""
LOADED_S = 10
"""Allowed on top, because other tests use the cores meanwhile."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param("slow", marks=pytest.mark.long), "hung"])
def test_stop_ends_in_time_whatever_redis_does(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path, fault: str
) -> None:
    """Replies take nearly as long as the time-out, or never come; jobs wait in the lane and are in flight."""
    with FaultProxy(redis_url) as proxy:
        worker = start_worker(
            redis_url=proxy.url,
            by_celery=True,
            celery_args="-E",
            grace_s=GRACE_S,
            redis_timeout_s=REDIS_TIMEOUT_S,
            lease_s=60,
            loaders=1,
        )
        ids = [f"job-{n}" for n in range(200)]
        if fault == "slow":
            proxy.delay(1.2)
        # Their source does not exist: each comes back for another attempt, so that all parts are busy.
        redis_client.lpush(Lane.BULK.queue, *[message(job_id, Lane.BULK) for job_id in ids])
        wait_until(lambda: redis_client.hlen(CLAIMS) > 0, timeout_s=20, every_s=0.001)
        if fault == "hung":
            proxy.black_hole()
        worker.terminate()
        assert worker.wait(timeout_s=DOCUMENTED_S + LOADED_S) == 0
        proxy.heal()
    if fault == "slow":
        assert redis_client.hlen(CLAIMS) == 0
        assert make_maintenance(redis_client).run_once().reaped == 0
