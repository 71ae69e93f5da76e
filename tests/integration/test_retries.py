"""Retries of a real worker: as often as SHIWU_RETRY says, and none counts as a worker death."""

from __future__ import annotations

import redis

from shiwu import Client
from shiwu.contract import ATTEMPTS, ErrorCode, Status
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.picture_server import PictureServer, Reply


def test_retries_follow_the_setting_and_count_no_deaths(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, http_server: PictureServer
) -> None:
    """Four attempts where one worker death would give a job up; the fifth attempt is not made."""
    good = Reply.picture(pictures.png(pictures.picture()))
    away = Reply.error(503)
    # A fetch tries three times by itself.
    late = http_server.serve("/late.png", *[away] * 9, good)
    never = http_server.serve("/never.png", away)
    start_worker(redis_url=redis_url, retry="source_unavailable=4:0.05:0.05", max_attempts=1, lease_s=3)
    with Client(redis_url) as client:
        client.enqueue(late, id="late")
        client.enqueue(never, id="never")
        tagged, failed = (client.wait(job_id, timeout_s=60) for job_id in ("late", "never"))
    assert (tagged.status, tagged.attempts) == (Status.TAGGED, 4)
    assert failed.error is not None
    assert (failed.status, failed.attempts, failed.error.code) == (Status.FAILED, 4, ErrorCode.SOURCE_UNAVAILABLE)
    assert redis_client.hlen(ATTEMPTS) == 0
