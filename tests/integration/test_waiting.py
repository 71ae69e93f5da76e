"""Whoever waits for an answer gets it, whatever was lost on the way: an announcement, a connection, a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu import Client
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import Answer, Status, result_key
from shiwu.errors import WaitTimeout
from tests.support.servers import Valkey
from tests.support.waiting import wait_until


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Valkey]:
    """A server that a test may stop."""
    with Valkey(folder=tmp_path / "own", config={"appendonly": "yes", "appendfsync": "always"}) as server:
        yield server


def tagged(client: redis.Redis, job_id: str) -> None:
    """A worker answers."""
    answer = Answer(id=job_id, status=Status.TAGGED, attempts=1)
    AnswerStore(client, token="w").write([AnswerEntry(answer=answer, id=job_id)])


def test_an_answer_whose_announcement_was_lost(redis_url: str, redis_client: redis.Redis) -> None:
    """It stands under its key, and whoever waits looks there again."""

    def looks() -> int:
        stats: Any = redis_client.info("commandstats")
        return int(stats.get("cmdstat_mget", {}).get("calls", 0))

    before = looks()
    with Client(redis_url) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait, "job", timeout_s=20)
        wait_until(lambda: looks() > before, timeout_s=10, what="the look after the subscription")
        tagged(redis_client, "other")
        # What the commit writes, without its PUBLISH.
        raw: Any = redis_client.get(result_key("other"))
        redis_client.set(result_key("job"), raw.replace(b"other", b"job"))
        assert waiting.result(timeout=10).id == "job"


def test_a_server_that_goes_and_comes_back(own: Valkey) -> None:
    """The wait goes on meanwhile, and ends with the answer that was given afterwards."""
    with Client(own.url, timeout_s=1) as client, ThreadPoolExecutor(1) as pool:
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


def test_a_server_that_hangs_holds_nobody_much_longer_than_asked(own: Valkey) -> None:
    """The wait ends by its own clock, at most one command later, also where connections are taken and that is all."""
    with Client(own.url, timeout_s=1) as client:
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


def test_a_password_that_is_wrong_is_not_waited_for(own: Valkey) -> None:
    """That will not pass by itself."""
    with Client(own.url) as client, own.client() as near:
        near.config_set("requirepass", "secret")
        near.execute_command("AUTH", "secret")
        near.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(redis.RedisError):
            client.wait("a", timeout_s=20)
        near.config_set("requirepass", "")
