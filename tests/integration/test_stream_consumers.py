"""Consumers of the results stream: what is delivered is delivered once, and nothing is left behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from shiwu import Client, StreamItem
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.steps import run
from shiwu.cli import main
from shiwu.client import stream
from shiwu.client.stream_items import EntryReader
from shiwu.contract import RESULT_STREAM, Answer, Status
from tests.support.both_clients import OpenClient
from tests.support.fault_proxy import FaultProxy
from tests.support.redis_server import RedisServer, redis_binary, valkey_binary
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

Fill = Callable[..., list[str]]


def fill(client: redis.Redis, count: int, *, prefix: str = "job") -> list[str]:
    """So many answers in the stream."""
    ids = [f"{prefix}-{number}" for number in range(count)]
    entries = [AnswerEntry(id=job_id, answer=Answer(id=job_id, status=Status.TAGGED)) for job_id in ids]
    AnswerStore(client, token="w").write(entries)
    return ids


def drain(client: Client, **options: Any) -> list[str]:
    """Read until nothing is left, acknowledge all, and give the ids in order."""
    ids_read = []
    for item in client.results(**({"group": "g", "block_s": 0.05, "stop_when_idle": True} | options)):
        ids_read.append(item.result.id)
        item.ack()
    return ids_read


def consumers(client: redis.Redis) -> dict[str, int]:
    """Name and number of pending entries of each consumer of the group."""
    found: Any = client.xinfo_consumers(RESULT_STREAM, "g")
    return {consumer["name"].decode(): consumer["pending"] for consumer in found}


class Consumer:
    """A loop in a thread of its own, that collects ids."""

    def __init__(self, client: Client, **options: Any) -> None:
        self.ids_read: list[str] = []
        self._loop = client.results(**({"group": "g", "block_s": 0.2} | options))
        self._pool = ThreadPoolExecutor(1)
        self._stopped = threading.Event()
        self.task = self._pool.submit(self._run)

    def _run(self) -> None:
        with closing(self._loop) as loop:  # type: ignore[type-var]  # it is a generator
            for item in loop:
                self.ids_read.append(item.result.id)
                item.ack(away_s=30)
                if item.result.id == "end-0":
                    return

    def wait(self, client: redis.Redis) -> list[str]:
        """Give it a last answer, and wait until it has that."""
        fill(client, 1, prefix="end")
        self.task.result(timeout=30)
        self._pool.shutdown()
        return self.ids_read[:-1]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Valkey]:
    """A server that a test may stop."""
    with Valkey(folder=tmp_path / "own", config={"appendonly": "yes", "appendfsync": "always"}) as server:
        yield server


def test_results_go_on_after_redis_was_unavailable(
    open_client: OpenClient, own: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop waits and continues where it was; the logger reports both."""
    with open_client(own.url, timeout_s=1) as client:
        consumer = Consumer(client)
        with own.client() as near:
            first = fill(near, 50, prefix="first")
        wait_until(lambda: len(consumer.ids_read) == 50, timeout_s=20)
        own.kill()
        wait_until(lambda: "redis_away" in caplog.text, timeout_s=20)
        own.restart()
        wait_until(lambda: "Redis answers again" in caplog.text, timeout_s=20, what="the end, before an answer comes")
        with own.client() as near:
            second = fill(near, 50, prefix="second")
            assert consumer.wait(near) == first + second


def test_results_raise_after_a_long_outage(open_client: OpenClient, own: Valkey) -> None:
    """After `away_s`; an error that waiting cannot cure is raised immediately."""
    with open_client(own.url, timeout_s=1) as client:
        own.kill()
        with pytest.raises(redis.ConnectionError):
            drain(client, away_s=0.5)
        own.restart()
        with own.client() as near:
            near.set(RESULT_STREAM, "a foreign type")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            drain(client)


@pytest.mark.parametrize("cut_bytes", [0, 4000])
def test_results_of_a_lost_reply_are_read_again(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis, cut_bytes: int
) -> None:
    """Entries that the server delivered and the client did not get are read again, in order."""
    ids = fill(redis_client, 60)
    with FaultProxy(redis_url) as proxy, open_client(proxy.url, timeout_s=5) as client:
        loop = client.results(group="g", block_s=0.05, batch=20, stop_when_idle=True)
        ids_read = []
        for item in loop:
            ids_read.append(item.result.id)
            if len(ids_read) == 20:
                proxy.cut_reply_after(cut_bytes + 100)  # the next portion, after the reply to the acknowledgement
            item.ack(away_s=10)
    assert proxy.cuts == 1
    assert ids_read == ids
    assert redis_client.xpending(RESULT_STREAM, "g")["pending"] == 0


@pytest.fixture(scope="module", params=["valkey", "redis"])
def any_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The newest server and the oldest one that is supported, whose errors have other texts."""
    binary = valkey_binary() if request.param == "valkey" else redis_binary()
    with RedisServer(folder=tmp_path_factory.mktemp(request.param), binary=binary) as server:
        yield server


def test_results_go_on_after_the_stream_was_deleted(open_client: OpenClient, any_server: RedisServer) -> None:
    """While the loop blocks, and while it works on a portion; the group is created again."""
    with any_server.client() as redis_client, open_client(any_server.url) as client:
        redis_client.flushall()
        consumer = Consumer(client, block_s=2.0)
        first = fill(redis_client, 5, prefix="first")
        wait_until(lambda: len(consumer.ids_read) == 5, timeout_s=20)
        redis_client.delete(RESULT_STREAM)
        second = fill(redis_client, 5, prefix="second")
        assert consumer.wait(redis_client) == first + second
        third = fill(redis_client, 5, prefix="third")
        with closing(client.results(group="h", reclaim_idle_s=0.0)) as loop:  # type: ignore[type-var]  # a generator
            ids_read = [next(loop).result.id]
            redis_client.delete(RESULT_STREAM)
            ids_read += [next(loop).result.id for _ in range(len(second) + len(third))]
        assert ids_read[-len(third) :] == third, "what was read before is delivered, with or without the stream"


def test_consumers_without_names_get_each_answer_once(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """Two threads of one client, whose work on a portion takes longer than `reclaim_idle_s`."""
    ids = fill(redis_client, 200)
    pause = threading.Event()

    def work(client: Client, each_s: float) -> list[str]:
        ids_read = []
        for item in client.results(group="g", block_s=0.05, reclaim_idle_s=0.5, stop_when_idle=True):
            ids_read.append(item.result.id)
            pause.wait(each_s)
            item.ack()
        return ids_read

    with open_client(redis_url) as client, ThreadPoolExecutor(2) as pool:
        found = [task.result(timeout=60) for task in [pool.submit(work, client, each_s) for each_s in (0.003, 0.03)]]
    assert sorted(found[0] + found[1]) == sorted(ids)
    assert all(found), "both had work"
    assert consumers(redis_client) == {}, "each has left"


def test_answers_of_a_slow_consumer_go_to_another(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """It works on one answer for too long: another consumer takes over the rest, and the first does not get them."""
    ids = fill(redis_client, 10)
    with open_client(redis_url) as client:
        with closing(client.results(group="g", consumer="slow", reclaim_idle_s=0.3, block_s=0.05)) as slow:  # type: ignore[type-var]  # a generator has close
            first = next(slow)
            # It holds ten, and does not come back for the second.
            wait_until(lambda: redis_client.xpending_range(RESULT_STREAM, "g", "-", "+", 10, idle=300), timeout_s=10)
            taken = drain(client, reclaim_idle_s=0.3)
            assert set(ids[1:]) <= set(taken)
            more = fill(redis_client, 1, prefix="more")
            assert next(slow).result.id == more[0]
        assert first.result.id == ids[0]


def test_answers_of_an_ended_loop_go_to_another(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """A loop that ends gives up the rest of its portion; answers that it yielded stay with it."""
    ids = fill(redis_client, 10)
    with open_client(redis_url) as client:
        with closing(client.results(group="g", consumer="left")) as left:  # type: ignore[type-var]  # a generator
            next(left)
        assert consumers(redis_client) == {"left": 10}
        ids_read = []
        for item in client.results(group="g", consumer="next"):
            ids_read.append(item.result.id)
            item.ack()
            if len(ids_read) == 9:
                break
    assert ids_read == ids[1:]
    assert consumers(redis_client) == {"left": 1, "next": 0}


def test_stop_when_idle_waits_for_a_crashed_consumer(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """96 of 100 are pending under its name: the loop logs it, and ends when it has taken them over."""
    ids = fill(redis_client, 100)
    redis_client.xgroup_create(RESULT_STREAM, "g", id="0")
    [[_, entries]] = redis_client.xreadgroup("g", "crashed", {RESULT_STREAM: ">"}, count=100)
    redis_client.xack(RESULT_STREAM, "g", *[entry_id for entry_id, _ in entries[:4]])
    with open_client(redis_url) as client, caplog.at_level(logging.WARNING, logger="shiwu"):
        assert drain(client, reclaim_idle_s=1.0) == ids[4:]
    assert caplog.text.count("crashed") == 1


def test_stop_when_idle_ends_without_acknowledgements(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """A loop that acknowledges later gets each answer once, however long it takes."""
    ids = fill(redis_client, 30)
    with open_client(redis_url) as client:
        ids_read = list(client.results(group="g", block_s=0.05, batch=10, reclaim_idle_s=0.0, stop_when_idle=True))
        assert [item.result.id for item in ids_read] == ids
        for item in ids_read:
            item.ack()
    assert redis_client.xpending(RESULT_STREAM, "g")["pending"] == 0


def test_stop_when_idle_ends_after_others_acknowledged(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """It waits for entries that were pending, not for later ones, and takes nothing from other consumers."""
    fill(redis_client, 3)
    with (
        open_client(redis_url) as client,
        ThreadPoolExecutor(1) as pool,
        closing(client.results(group="g", consumer="other", block_s=0.05)) as other,  # type: ignore[type-var]  # a generator has close
    ):
        held = [next(other) for _ in range(3)]
        draining = pool.submit(drain, client)
        with pytest.raises(TimeoutError):
            draining.result(timeout=0.7)
        for item in held:
            item.ack()
        assert draining.result(timeout=10) == []


def test_consumer_of_the_same_name_begins_with_its_own(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """All that it left unacknowledged, the oldest first and across portions, before any new answer."""
    ids = fill(redis_client, 5)
    redis_client.xgroup_create(RESULT_STREAM, "g", id="0")
    redis_client.xreadgroup("g", "mine", {RESULT_STREAM: ">"}, count=4)
    with open_client(redis_url) as client:
        assert drain(client, consumer="mine", batch=2, reclaim_idle_s=3600.0) == ids


def test_pending_entries_that_were_trimmed_are_acknowledged(redis_client: redis.Redis) -> None:
    """They can no longer be delivered, and Redis 6.2 would keep them pending forever."""
    fill(redis_client, 4)
    redis_client.xgroup_create(RESULT_STREAM, "g", id="0")
    redis_client.xreadgroup("g", "mine", {RESULT_STREAM: ">"}, count=3)
    redis_client.xtrim(RESULT_STREAM, maxlen=2, approximate=False)
    reply: Any = redis_client.xreadgroup("g", "mine", {RESULT_STREAM: "0"})
    reader = EntryReader(group="g", on_unreadable=pytest.fail)
    entries = run(redis_client, reader.read_steps(reply[0][1]))
    assert [entry.result.id for entry in entries] == ["job-2"]
    assert redis_client.xpending(RESULT_STREAM, "g")["pending"] == 1


def test_idle_consumers_without_entries_are_removed(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of processes that ended long ago; never one that holds entries."""
    monkeypatch.setattr("shiwu.client.stream.CONSUMER_TTL_S", 0.0)
    fill(redis_client, 2)
    redis_client.xgroup_create(RESULT_STREAM, "g", id="0")
    redis_client.xreadgroup("g", "holds", {RESULT_STREAM: ">"}, count=1)
    redis_client.xgroup_createconsumer(RESULT_STREAM, "g", "empty")
    with open_client(redis_url) as client:
        loop: Iterator[StreamItem] = client.results(group="g", consumer="new", reclaim_idle_s=0.0)
        next(loop).ack()
        assert set(consumers(redis_client)) == {"holds", "new"}


def test_results_work_with_an_older_acl(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the new commands the loop reads as before, and logs which right is missing."""
    fill(redis_client, 30)
    rights = ["+ping", "+select", "+client", "+xgroup|create", "+xreadgroup", "+xautoclaim", "+xack"]
    redis_client.acl_setuser("old", enabled=True, nopass=True, keys=[RESULT_STREAM], commands=rights)
    try:
        with open_client(redis_url.replace("://", "://old:x@")) as client:
            assert len(drain(client, reclaim_idle_s=0.0001)) == 30
    finally:
        redis_client.acl_deluser("old")
    assert "redis_permission" in caplog.text


def test_cli_results_reports_wait_for_a_consumer(redis_url: str, redis_client: redis.Redis) -> None:
    """On standard error, so that standard output has only JSON lines."""
    fill(redis_client, 2)
    redis_client.xgroup_create(RESULT_STREAM, "g", id="0")
    [[_, entries]] = redis_client.xreadgroup("g", "crashed", {RESULT_STREAM: ">"}, count=1)
    redis_client.config_resetstat()
    with ThreadPoolExecutor(1) as pool:
        runner = CliRunner()
        running = pool.submit(runner.invoke, main, ["--redis-url", redis_url, "results", "--group", "g"])
        wait_until(lambda: redis_client.info("commandstats").get("cmdstat_xpending"), timeout_s=10)
        redis_client.xack(RESULT_STREAM, "g", entries[0][0])
        result = running.result(timeout=20)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert "shiwu: waiting for answers" in result.stderr
    assert "crashed" in result.stderr


def test_idle_consumers_are_looked_for_once_in_a_while(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at each portion: it is a script over all consumers of the group."""
    looked: list[str] = []
    drop = stream.StreamReader._drop_consumers

    def count(reader: stream.StreamReader, name: str, *, idle_ms: int) -> Any:
        looked.append(name)
        return drop(reader, name, idle_ms=idle_ms)

    monkeypatch.setattr(stream.StreamReader, "_drop_consumers", count)
    ids = fill(redis_client, 30)
    with Client(redis_url) as client:
        assert drain(client, batch=5) == ids
    assert looked.count("") == 1
