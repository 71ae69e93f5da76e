"""Calls whose reply is lost: the client repeats them by itself, and they are carried out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from shiwu import Client
from shiwu.broker.answers import AnswerEntry
from shiwu.contract import ATTEMPTS, CALL_REPLY, CLAIMS, COUNTERS, RESULT_STREAM, Answer, Lane, Status
from tests.support.both_clients import OpenClient
from tests.support.fault_proxy import FaultProxy
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until

IDS = ("one", "two")


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of the real server."""
    with FaultProxy(redis_url) as running:
        yield running


@pytest.fixture
def either(open_client: OpenClient, proxy: FaultProxy) -> Iterator[Client]:
    """Each of the two clients, over the proxy."""
    with open_client(proxy.url) as connected:
        yield connected


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[Client]:
    """A client through the proxy, which repeats lost commands."""
    with Client(proxy.url) as connected:
        yield connected


def fail_jobs(redis_client: redis.Redis) -> None:
    """Make a dead letter of each id."""
    redis_client.lpush(Lane.BULK.queue, *[message(job_id, Lane.BULK) for job_id in IDS])
    entries = [
        AnswerEntry(
            id=job.id,
            answer=Answer(id=job.id, status=Status.FAILED),
            message=b"shiwu.bulk|" + job.raw,
            is_dead=True,
        )
        for job in make_lease_queue(redis_client, "w").claim(5).jobs
    ]
    make_answer_store(redis_client, "w").write(entries)


def without_reply(proxy: FaultProxy, call: Callable[[], object]) -> object:
    """What a call gives whose first reply never comes. The scripts were loaded by an earlier call."""
    cuts = proxy.cuts
    proxy.cut_reply_after(0)
    reply = call()
    assert proxy.cuts == cuts + 1
    return reply


def test_requeue_without_reply_requeues_once(proxy: FaultProxy, either: Client, redis_client: redis.Redis) -> None:
    """The ids are reported although the first run requeued them, and each message is in the lane once."""
    fail_jobs(redis_client)
    either.requeue(["none"])
    assert without_reply(proxy, lambda: either.requeue(IDS)) == list(IDS)
    assert redis_client.llen(Lane.BULK.queue) == 2
    assert redis_client.hget(COUNTERS, "requeued") == b"2"
    assert all(0 < redis_client.ttl(key) <= 60 for key in redis_client.keys(f"{CALL_REPLY}*"))


def test_drop_without_reply_reports_the_number(proxy: FaultProxy, either: Client, redis_client: redis.Redis) -> None:
    """Both dead letters are reported as deleted."""
    fail_jobs(redis_client)
    either.drop(["none"])
    assert without_reply(proxy, lambda: either.drop(IDS)) == 2


def test_sweep_without_reply_answers_what_it_took(
    proxy: FaultProxy, client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expired messages are answered by the sweep itself and not after the end of its lease."""
    client.enqueue("s3://b/k.jpg", id="warm", lane="bulk", expires_s=0.001)
    wait_until(lambda: client.sweep().expired, timeout_s=5, what="the deadline of the first")
    for job_id in IDS:
        client.enqueue("s3://b/k.jpg", id=job_id, lane="bulk", expires_s=0.001)
    sent_s, sent_us = redis_client.time()
    wait_until(lambda: redis_client.time() > (sent_s, sent_us + 10_000), timeout_s=5, what="the deadline of both")
    take_late = client._sweeper.shards[0]._expiry._take_late
    monkeypatch.setattr(
        client._sweeper.shards[0]._expiry, "_take_late", lambda **call: without_reply(proxy, lambda: take_late(**call))
    )
    assert client.sweep().expired == 2
    assert redis_client.exists(CLAIMS, ATTEMPTS) == 0
    assert redis_client.xlen(RESULT_STREAM) == 3


def test_trim_without_reply_names_the_groups(proxy: FaultProxy, client: Client, redis_client: redis.Redis) -> None:
    """The groups that lost entries are reported although the first run trimmed the stream."""
    client._sweeper.shards[0].trim()
    redis_client.lpush(Lane.BULK.queue, *[message(job_id, Lane.BULK) for job_id in IDS])
    redis_client.xgroup_create(RESULT_STREAM, "archive", mkstream=True)
    make_answer_store(redis_client, "w").write(
        [answer(job) for job in make_lease_queue(redis_client, "w").claim(5).jobs]
    )
    maintenance = make_maintenance(client._redis[0], stream_length=1)
    assert without_reply(proxy, maintenance.trim) == {"archive": 1}


def test_messages_taken_by_a_lost_sweep_count_no_attempt(redis_client: redis.Redis) -> None:
    """A sweep that ends after it took a message: the lease expires, and nothing was tried or crashed."""
    raw = message("late", Lane.BULK)
    redis_client.lpush(Lane.BULK.queue, raw)
    maintenance = make_maintenance(redis_client, "sweep")
    taken = maintenance._expiry._take_late(
        keys=[CLAIMS, "shiwu:leases", ATTEMPTS, Lane.BULK.queue], args=["sweep", 0, Lane.BULK.queue, "late", raw]
    )
    assert taken == [1, 0]
    assert make_maintenance(redis_client).run_once().reaped == 1
    [job] = make_lease_queue(redis_client, "w").claim(1).jobs
    assert (job.attempt, job.deaths, job.history) == (1, 0, b"")
