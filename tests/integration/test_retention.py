"""A producer that cancels and a sweep throw nothing away that the operator wants kept."""

from __future__ import annotations

from typing import Any

import redis

from shiwu import Client
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.retention import PublishedRetention, Retention, RetentionPublisher
from shiwu.contract import DEAD, DEADLINES, RESULT_STREAM, RETENTION, WORKERS, Answer, Status, result_key
from tests.support.servers import Valkey


def bury(client: redis.Redis, count: int) -> None:
    """Dead letters, each with its place in the stream."""
    answers = [Answer(id=f"d{n}", status=Status.FAILED, attempts=1) for n in range(count)]
    entries = [AnswerEntry(answer=one, id=one.id or "", message=b"shiwu.bulk|x", is_dead=True) for one in answers]
    AnswerStore(client, token="w", keep=Retention(dead_length=10**6)).write(entries)


def test_where_nobody_says_anything_nothing_goes(redis_url: str, redis_client: redis.Redis) -> None:
    """No worker has ever run here: the sweep does its other work."""
    bury(redis_client, 30)
    redis_client.zadd(DEAD, dict.fromkeys([f"d{n}" for n in range(30)], 1.0))  # very old
    with Client(redis_url) as client:
        client.sweep()
        client.cancel("j")
    assert (redis_client.zcard(DEAD), redis_client.xlen(RESULT_STREAM)) == (30, 31)


def test_a_workers_limits_are_everybodys(redis_url: str, redis_client: redis.Redis) -> None:
    """A worker tells them; a sweep and a cancelling producer then keep as much, and as long."""
    keep = Retention(result_ttl_s=500, done_ttl_s=600, dead_length=7, stream_length=20)
    worker = Maintenance(
        redis_client,
        AnswerStore(redis_client, token="w"),
        name="w",
        token="w",
        keep=RetentionPublisher(redis_client, keep),
    )
    worker.tend()
    assert PublishedRetention(redis_client)() == keep
    bury(redis_client, 30)
    with Client(redis_url) as client:
        client.cancel("j")
        assert redis_client.zcard(DEAD) == 7
        assert 400 < redis_client.ttl(result_key("j")) <= 500
        client.sweep()
        assert redis_client.xlen(RESULT_STREAM) == 20


def test_limits_that_make_no_sense_are_passed_over(redis_client: redis.Redis) -> None:
    """Of another version, or by another hand."""
    redis_client.hset(RETENTION, mapping={"dead_length": "many", "stream_length": "55", b"\xff": "1", "new": "2"})
    assert PublishedRetention(redis_client)().stream_length == 55


def test_a_deadline_that_names_no_job_goes(redis_client: redis.Redis) -> None:
    """A member that is no id neither ends whoever tends nor comes back each second, and is answered by nobody."""
    redis_client.zadd(DEADLINES, {b"\xff\xfe": 1.0, b"i" * 256: 1.0, b"": 1.0, b"job": 1.0})
    upkeep = Maintenance(redis_client, AnswerStore(redis_client, token="s"), token="s")
    upkeep.tend()
    assert redis_client.zcard(DEADLINES) == 0
    entries: Any = redis_client.xrange(RESULT_STREAM)
    assert [fields[b"id"] for _, fields in entries] == [b"job"]


def test_limits_that_may_not_be_written_or_read_hold_nobody_up(valkey: Valkey) -> None:
    """A full server, and an ACL from before there was such a key: upkeep and cancels go on."""
    with valkey.client() as near, Client(valkey.url) as client:
        near.config_set("maxmemory-policy", "noeviction")
        near.config_set("maxmemory", 1)
        worker = Maintenance(
            near, AnswerStore(near, token="w"), name="", token="w", keep=RetentionPublisher(near, Retention())
        )
        assert worker.tend().reaped == 0
        near.config_set("maxmemory", 0)
        near.set(RETENTION, "of a wrong type")
        assert client.cancel("j") == ["j"]


def test_names_that_are_no_text_are_shown(redis_url: str, redis_client: redis.Redis) -> None:
    """A worker's or a group's name may be anything."""
    redis_client.zadd(WORKERS, {b"\xff": 1e15})
    redis_client.xgroup_create(RESULT_STREAM, b"\xfe", id="0", mkstream=True)
    bury(redis_client, 30)
    with Client(redis_url) as client:
        assert client.queue_state().workers == ("\ufffd",)
    keep = Retention(stream_length=20)
    assert Maintenance(redis_client, AnswerStore(redis_client, token="s"), keep=keep).trim() == {"\ufffd": 10}
