"""A waiting client gets its answer although a message, a connection or a server was lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import Answer, Status, result_key
from shiwu.errors import WaitTimeout
from tests.support.both_clients import OpenClient
from tests.support.servers import Valkey
from tests.support.waiting import wait_until


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Valkey]:
    """A server of this test, which it may stop."""
    with Valkey(folder=tmp_path / "own", config={"appendonly": "yes", "appendfsync": "always"}) as server:
        yield server


def tagged(client: redis.Redis, job_id: str) -> None:
    """Answer a job, as a worker does."""
    answer = Answer(id=job_id, status=Status.TAGGED, attempts=1)
    AnswerStore(client, token="w").write([AnswerEntry(answer=answer, id=job_id)])


def test_wait_finds_an_answer_without_announcement(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """The answer is under its key, and the wait polls."""

    def looks() -> int:
        stats: Any = redis_client.info("commandstats")
        return int(stats.get("cmdstat_mget", {}).get("calls", 0))

    before = looks()
    with open_client(redis_url) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait, "job", timeout_s=20)
        wait_until(lambda: looks() > before, timeout_s=10, what="the look after the subscription")
        tagged(redis_client, "other")
        # What the commit writes, without its PUBLISH.
        raw: Any = redis_client.get(result_key("other"))
        redis_client.set(result_key("job"), raw.replace(b"other", b"job"))
        assert waiting.result(timeout=10).id == "job"


def test_wait_goes_on_after_redis_was_unavailable(open_client: OpenClient, own: Valkey) -> None:
    """It ends with the answer that came afterwards."""
    with open_client(own.url, timeout_s=1) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_many, ["a", "b"], timeout_s=40)
        with own.client() as near:
            wait_until(lambda: near.pubsub_numsub(result_key("a"))[0][1] == 1, timeout_s=10)
            tagged(near, "a")
        own.kill()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        own.restart()
        with own.client() as near:
            tagged(near, "b")
        assert sorted(waiting.result(timeout=20)) == ["a", "b"]


def test_wait_on_a_hanging_server_ends_in_time(open_client: OpenClient, own: Valkey) -> None:
    """It ends by its own clock, at most one command later, also where the server only accepts connections."""
    with open_client(own.url, timeout_s=1) as client:
        with pytest.raises(WaitTimeout):
            client.wait("a", timeout_s=0.1)
        own.pause()
        try:
            for _ in range(2):  # on the connections that are there, then on new ones
                began_s = time.monotonic()
                with pytest.raises(WaitTimeout):
                    client.wait("a", timeout_s=0.5)
                assert time.monotonic() - began_s < 20
        finally:
            own.resume()


def test_wait_with_wrong_password_raises_immediately(open_client: OpenClient, own: Valkey) -> None:
    """Waiting cannot cure this error."""
    with open_client(own.url) as client, own.client() as near:
        near.config_set("requirepass", "secret")
        near.execute_command("AUTH", "secret")
        near.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(redis.RedisError):
            client.wait("a", timeout_s=20)
        near.config_set("requirepass", "")
