"""A source that is away for a while: tried again with a delay, and given up aloud in the end."""

from __future__ import annotations

import redis

from shiwu.contract import ATTEMPTS, CLAIMS, DEAD_MESSAGES, DELAYED, Status
from shiwu.message import read_message
from tests.conftest import StartWorker
from tests.integration.test_service import ask
from tests.support import pictures
from tests.support.picture_server import PictureServer, Reply


def test_a_source_that_comes_back_and_one_that_does_not(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, http_server: PictureServer
) -> None:
    """The first is tagged at its second attempt; the second ends as `failed`, and its message is kept."""
    options = {"max_batch": 8, "loaders": 1, "loader_spares": 0, "torch_threads": 1}
    worker = start_worker(redis_url=redis_url, retry_first_s=0.2, max_attempts=2, **options)
    good = Reply.picture(pictures.jpeg(pictures.picture()))
    back = http_server.serve("/back.jpg", *[Reply.error(503)] * 3, good)
    away = http_server.serve("/away.jpg", Reply.error(503))
    tagged = ask(redis_url, back, "back")
    assert (tagged.status, tagged.attempts) == (Status.TAGGED, 2)
    failed = ask(redis_url, away, "away")
    assert (failed.status, failed.attempts) == (Status.FAILED, 2)
    assert failed.error is not None
    assert (failed.error.code.value, failed.error.retryable) == ("source_unavailable", True)
    [(job_id, record)] = redis_client.hgetall(DEAD_MESSAGES).items()
    assert job_id == b"away"
    assert read_message(record.partition(b"|")[2]).fields["image"] == away
    assert redis_client.hlen(ATTEMPTS) == redis_client.hlen(CLAIMS) == redis_client.zcard(DELAYED) == 0
    assert worker.log_text().count('"event": "later"') == 2
