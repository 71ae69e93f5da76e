"""Images of hosts that send slowly, and all others, which must not wait for them."""

from __future__ import annotations

from typing import Final

import redis

from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request, Status, result_key
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.ask import ask, read_answer
from tests.support.http_texts import OK
from tests.support.picture_server import PictureServer, Reply
from tests.support.processes import LOOPBACK
from tests.support.raw_server import RawServer, says
from tests.support.waiting import wait_until

DRIP: Final = says(OK + b"Content-Type: image/jpeg\r\nContent-Length: 50000\r\n\r\n", then=b"x")
SLOW_JOBS: Final = 200


def _enqueue(client: redis.Redis, url: str, job_id: str) -> None:
    client.lpush(Lane.BULK.queue, build_message(Request(image=url), job_id=job_id, lane=Lane.BULK))


def test_bulk_hosts_that_drip_do_not_hold_up_other_jobs(
    redis_client: redis.Redis, redis_url: str, start_worker: StartWorker, http_server: PictureServer
) -> None:
    """200 images that send a byte a second: interactive is answered before any of them, and so is other bulk."""
    good = http_server.serve("/good.png", Reply.picture(pictures.png(pictures.picture())))
    with RawServer(DRIP, pause_s=1.0) as server:
        start_worker(
            redis_url=redis_url,
            allow_hosts=f"{http_server.host},{LOOPBACK}:{server.port}",
            loaders=1,
            loader_threads=4,
            min_rate_after_s=2,
            grace_s=1,
            retry="source_unavailable=1:1:1",
        )
        for n in range(SLOW_JOBS):
            _enqueue(redis_client, f"http://{LOOPBACK}:{server.port}/{n}.jpg", f"slow-{n}")
        wait_until(lambda: server.connections >= 2, timeout_s=20)
        for n in range(20):
            assert ask(redis_url, good, f"interactive-{n}").status is Status.TAGGED
        slow_keys = [result_key(f"slow-{n}") for n in range(SLOW_JOBS)]
        assert redis_client.exists(*slow_keys) < SLOW_JOBS // 4
        # The jobs in front of it in the lane give their slots back, because their host is slow.
        _enqueue(redis_client, good, "bulk")
        assert read_answer(redis_client, "bulk", timeout_s=60).status is Status.TAGGED
        assert redis_client.exists(*slow_keys) < SLOW_JOBS // 2
        failed = read_answer(redis_client, "slow-0", timeout_s=60)
    assert failed.error is not None
    assert failed.error.code.value == "source_unavailable"
    assert "bytes/s" in failed.error.message
