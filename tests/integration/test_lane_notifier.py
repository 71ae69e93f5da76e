"""The lane notifier against real servers: what wakes it, what it costs, and what it does where the server refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from shiwu.contract import Lane
from shiwu_worker.stages.claim.notifier import LaneNotifier
from tests.support.redis_server import RedisServer, redis_binary
from tests.support.waiting import wait_until

NAME = "waiting-worker"
LONG_S = 30.0


@contextmanager
def open_notifier(url: str, **options: Any) -> Iterator[LaneNotifier]:
    """A notifier with a connection of its own name."""
    with redis.Redis.from_url(url, protocol=3, client_name=NAME, socket_timeout=5, **options) as client:
        notifier = LaneNotifier(client)
        yield notifier
        notifier.close()


@pytest.fixture
def notifier(redis_url: str) -> Iterator[LaneNotifier]:
    """A notifier on the server of the tests."""
    with open_notifier(redis_url) as opened:
        yield opened


class Waiting:
    """A wait on a thread of its own."""

    def __init__(self, wait: Callable[[], bool]) -> None:
        self._wait = wait
        self.found: bool | None = None
        self.ended_s = 0.0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.found = self._wait()
        self.ended_s = time.monotonic()

    def result(self) -> bool | None:
        """What the wait returned."""
        self.thread.join(20.0)
        assert not self.thread.is_alive()
        return self.found


def is_tracking(client: redis.Redis) -> bool:
    """Whether the notifier has asked, and waits to be notified."""
    clients: Any = client.client_list()
    return any(one["name"] == NAME and "t" in one["flags"] and one["cmd"] == "exists" for one in clients)


def idle(notifier: LaneNotifier, client: redis.Redis, lanes: tuple[Lane, ...] = tuple(Lane)) -> Waiting:
    """A wait that has asked the server."""
    waiting = Waiting(lambda: notifier.wait(LONG_S, lanes=lanes))
    wait_until(lambda: is_tracking(client), timeout_s=10)
    return waiting


@pytest.mark.parametrize("key", [key for lane in Lane for key in lane.keys], ids=lambda key: repr(key)[1:-1])
def test_message_in_any_key_of_a_lane_ends_the_wait(
    notifier: LaneNotifier, redis_client: redis.Redis, key: str
) -> None:
    """And stays where it is."""
    waiting = idle(notifier, redis_client)
    redis_client.lpush(key, "message")
    assert waiting.result() is True
    assert redis_client.lrange(key, 0, -1) == [b"message"]


def test_message_within_a_transaction_ends_the_wait(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """As kombu enqueues."""
    waiting = idle(notifier, redis_client)
    with redis_client.pipeline(transaction=True) as pipe:
        pipe.lpush(Lane.BULK.queue, "message").set("other", 1).execute()
    assert waiting.result() is True


def test_message_that_waits_already_is_seen_at_once(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    redis_client.lpush(Lane.BULK.queue, "message")
    assert notifier.wait(LONG_S)
    assert notifier.wait(LONG_S)


def test_message_of_another_lane_is_left_alone(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """While bulk has no room its messages must not wake the claim thread."""
    redis_client.lpush(Lane.BULK.queue, "before")
    waiting = idle(notifier, redis_client, (Lane.INTERACTIVE,))
    redis_client.lpush(Lane.BULK.queue, "bulk")
    redis_client.lpush(Lane.INTERACTIVE.queue, "interactive")
    assert waiting.result() is True
    redis_client.delete(Lane.INTERACTIVE.queue)
    assert notifier.wait(0.05, lanes=(Lane.INTERACTIVE,)) is False


def test_message_that_another_worker_took_is_not_reported(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """The server notifies of it, and the lanes are empty again: no claim, and the wait goes on."""
    waiting = idle(notifier, redis_client)
    asked = redis_client.info("commandstats")["cmdstat_exists"]["calls"]
    with redis_client.pipeline(transaction=True) as pipe:
        pipe.lpush(Lane.BULK.queue, "message").rpop(Lane.BULK.queue).execute()
    wait_until(lambda: redis_client.info("commandstats")["cmdstat_exists"]["calls"] > asked, timeout_s=5)
    assert waiting.found is None
    redis_client.lpush(Lane.BULK.queue, "message")
    assert waiting.result() is True


def test_many_changes_between_two_waits_do_not_mislead(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """Notifications of earlier changes are read with the next reply; the wait after them is as good as the first."""
    assert notifier.wait(0.01) is False
    for _ in range(50):
        redis_client.lpush(Lane.BULK.queue, "message")
        assert notifier.wait(LONG_S)
        redis_client.delete(Lane.BULK.queue)
    waiting = idle(notifier, redis_client)
    assert waiting.found is None
    redis_client.lpush(Lane.BULK.keys[3], "message")
    assert waiting.result() is True


def test_notify_ends_the_wait_and_only_one(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    waiting = idle(notifier, redis_client)
    notifier.notify()
    assert waiting.result() is True
    notifier.notify()
    assert notifier.wait(LONG_S) is True
    assert notifier.wait(0.0) is False


def test_close_ends_the_wait(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    waiting = idle(notifier, redis_client)
    notifier.close()
    assert waiting.result() is False
    assert notifier.wait(LONG_S) is False


def test_idle_worker_holds_one_connection_and_asks_once(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """For each wait, however long it is."""
    assert notifier.wait(0.01) is False
    before = redis_client.info("commandstats")["cmdstat_exists"]["calls"]
    assert notifier.wait(0.5) is False
    assert redis_client.info("commandstats")["cmdstat_exists"]["calls"] == before + 1
    clients: Any = redis_client.client_list()
    assert sum(one["name"] == NAME for one in clients) == 1


def test_lost_connection_is_made_anew(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """The wait ends within a second, and the next claim reports the error of Redis; later waits are notified again."""
    waiting = idle(notifier, redis_client)
    [number] = [one["id"] for one in redis_client.client_list() if one["name"] == NAME]
    redis_client.client_kill_filter(_id=number)
    assert waiting.result() is False
    waiting = idle(notifier, redis_client)
    redis_client.lpush(Lane.BULK.queue, "message")
    assert waiting.result() is True


def test_reconnect_uses_another_connection(notifier: LaneNotifier, redis_client: redis.Redis) -> None:
    """After a claim failed, because the server may be a replica now."""
    assert notifier.wait(0.01) is False
    [before] = [one["id"] for one in redis_client.client_list() if one["name"] == NAME]
    notifier.reconnect()
    assert notifier.wait(0.01) is False
    [after] = [one["id"] for one in redis_client.client_list() if one["name"] == NAME]
    assert after != before


def test_refused_tracking_is_replaced_by_looking(redis_url: str, redis_client: redis.Redis) -> None:
    """With an ACL of an earlier version: the worker says so once and looks at the lanes 20 times a second."""
    redis_client.acl_setuser(
        "old-worker", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client|tracking"]
    )
    try:
        with open_notifier(redis_url, username="old-worker", password="secret") as notifier, capture_logs() as logs:
            waiting = Waiting(lambda: notifier.wait(LONG_S))
            wait_until(lambda: bool(logs), timeout_s=10)
            redis_client.lpush(Lane.INTERACTIVE.queue, "message")
            assert waiting.result() is True
            redis_client.delete(Lane.INTERACTIVE.queue)
            assert notifier.wait(0.2) is False
        assert [(log["event"], log["log_level"]) for log in logs] == [("lane_tracking_refused", "warning")]
    finally:
        redis_client.acl_deluser("old-worker")


def test_wrong_login_is_not_taken_for_refused_tracking(redis_url: str, redis_client: redis.Redis) -> None:
    """The next claim reports it; once the login is right the server notifies."""
    with open_notifier(redis_url, username="late-worker", password="secret") as notifier, capture_logs() as logs:
        assert notifier.wait(0.05) is False
        redis_client.acl_setuser("late-worker", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all"])
        try:
            waiting = idle(notifier, redis_client)
            redis_client.lpush(Lane.BULK.queue, "message")
            assert waiting.result() is True
        finally:
            redis_client.acl_deluser("late-worker")
    assert logs == []


def test_oldest_supported_redis_notifies(tmp_path: Path) -> None:
    with (
        RedisServer(folder=tmp_path / "redis", binary=redis_binary()) as server,
        server.client() as client,
        open_notifier(server.url) as notifier,
    ):
        waiting = idle(notifier, client)
        client.lpush(Lane.BULK.queue, "message")
        assert waiting.result() is True


@pytest.mark.parametrize(("lanes", "found"), [((Lane.BULK,), False), (tuple(Lane), True)], ids=["bulk", "both"])
def test_lane_that_is_not_served_is_never_waited_for(
    redis_url: str, redis_client: redis.Redis, lanes: tuple[Lane, ...], *, found: bool
) -> None:
    redis_client.lpush(Lane.INTERACTIVE.queue, "message")
    with redis.Redis.from_url(redis_url, protocol=3) as client:
        notifier = LaneNotifier(client, lanes=lanes)
        assert notifier.wait(0.05) is found
        notifier.close()
