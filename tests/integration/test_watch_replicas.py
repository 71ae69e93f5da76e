"""`shiwu watch --replicas`: an event is removed once a replica has confirmed what it became."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu.contract import WATCH_UNREAD, Lane
from shiwu.watch import watcher
from shiwu.watch.keys import taken_key
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.watch import KEY, access_event, drain, source, total, waiting_jobs, watch_process, write_rules

UNCONFIRMED_TIMEOUT_S = 3 * watcher.UNCONFIRMED_PAUSE_S + 30


@pytest.mark.parametrize(
    ("event", "key"), [(access_event("a.jpg"), Lane.BULK.queue), (b"no JSON", WATCH_UNREAD)], ids=["job", "unreadable"]
)
def test_events_wait_for_replicas(
    replicated: tuple[RedisServer, RedisServer], tmp_path: Path, event: bytes, key: str
) -> None:
    """Where the replica hangs, the event stays with the watcher, and goes when the replica confirms what it became."""
    primary, replica = replicated
    write_rules(tmp_path)
    arguments = (source(primary.url), "--replicas", "1", "--name", "w")
    with primary.client() as client:
        replica.pause()
        try:
            with watch_process(primary.url, *arguments, folder=tmp_path) as watch:
                client.rpush(KEY, event)
                wait_until(lambda: "redis_not_replicated" in watch.log_text(), timeout_s=60, what="a line about it")
                assert client.llen(key) > 0
                assert client.llen(taken_key(KEY, "w")) == 1
                replica.resume()
                wait_until(lambda: not client.exists(KEY, taken_key(KEY, "w")), timeout_s=UNCONFIRMED_TIMEOUT_S)
                assert watch.stop() == 0
        finally:
            replica.resume()
        assert len({job_id for job_id, _ in waiting_jobs(client)}) == (key == Lane.BULK.queue)


def test_replica_that_confirms_costs_nothing(replicated: tuple[RedisServer, RedisServer], tmp_path: Path) -> None:
    """Each event is one message in the lane."""
    primary, _ = replicated
    rules = write_rules(tmp_path)
    with primary.client() as client:
        client.rpush(KEY, *(access_event(f"{number}.jpg") for number in range(5)))
        assert total(drain(primary.url, rules, "--replicas", "1"), "enqueued") == 5
        assert len(waiting_jobs(client)) == 5
