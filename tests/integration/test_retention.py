"""A cancelling producer and a sweep keep what the operator of the workers wants kept."""

from __future__ import annotations

import pytest
import redis

from shiwu import Client
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.retention import PublishedRetention, Retention, RetentionPublisher
from shiwu.contract import DEAD, DEADLINES, RESULT_STREAM, RETENTION, WORKERS, Answer, Status, done_key, result_key
from tests.support.servers import Valkey


def write_dead_letters(client: redis.Redis, count: int) -> None:
    """Write so many dead letters, each with an entry in the results stream."""
    answers = [Answer(id=f"d{n}", status=Status.FAILED, attempts=1) for n in range(count)]
    entries = [AnswerEntry(answer=answer, id=answer.id, message=b"shiwu.bulk|x", is_dead=True) for answer in answers]
    AnswerStore(client, token="w", retention=lambda: Retention(dead_length=10**6)).write(entries)


def test_sweep_without_published_limits_drops_nothing(redis_url: str, redis_client: redis.Redis) -> None:
    """Where no worker has published limits, the sweep does its other work only."""
    write_dead_letters(redis_client, 30)
    redis_client.zadd(DEAD, dict.fromkeys([f"d{n}" for n in range(30)], 1.0))  # very old
    with Client(redis_url) as client:
        client.sweep()
        client.cancel("j")
    assert (redis_client.zcard(DEAD), redis_client.xlen(RESULT_STREAM)) == (30, 31)


def test_limits_of_a_worker_apply_to_sweep_and_cancel(redis_url: str, redis_client: redis.Redis) -> None:
    """A worker publishes its limits; a sweep and a cancelling producer read them from Redis."""
    retention = Retention(result_ttl_s=500, done_ttl_s=600, dead_length=100, stream_length=1000)
    worker = Maintenance(
        redis_client,
        AnswerStore(redis_client, token="w"),
        name="w",
        token="w",
        retention=RetentionPublisher(redis_client, retention),
    )
    worker.run_once()
    assert PublishedRetention(redis_client)() == retention
    write_dead_letters(redis_client, 1100)
    with Client(redis_url) as client:
        client.cancel("j")
        assert redis_client.zcard(DEAD) == 100
        assert 400 < redis_client.ttl(result_key("j")) <= 500
        client.sweep()
        assert redis_client.xlen(RESULT_STREAM) == 1000


def test_unreadable_published_limits_are_ignored(redis_client: redis.Redis) -> None:
    """A field that another version or another program wrote does not hide the others."""
    redis_client.hset(RETENTION, mapping={"dead_length": "many", "stream_length": "5555", b"\xff": "1", "new": "2"})
    assert PublishedRetention(redis_client)().stream_length == 5555


def test_published_limits_are_held_to_bounds(redis_url: str, redis_client: redis.Redis) -> None:
    """A client that may write them can neither cut the stream to nothing nor make an answer's time invalid."""
    names = ("result_ttl_s", "done_ttl_s", "dead_length", "dead_age_s", "stream_length", "stream_bytes", "dead_bytes")
    redis_client.hset(RETENTION, mapping=dict.fromkeys(names, "0"))
    limits = PublishedRetention(redis_client)()
    assert {name: getattr(limits, name) for name in names} == {
        "result_ttl_s": 60,
        "done_ttl_s": 60,
        "dead_length": 100,
        "dead_age_s": 60,
        "stream_length": 1000,
        "stream_bytes": 1024 * 1024,
        "dead_bytes": 1024 * 1024,
    }
    redis_client.hset(RETENTION, mapping=dict.fromkeys(names, "9" * 40))
    with Client(redis_url) as client:
        assert client.cancel("job") == ["job"]
        assert client.wait("job", timeout_s=1).status is Status.CANCELLED
    redis_client.delete(RETENTION)
    redis_client.set(RETENTION, "x")
    assert PublishedRetention(redis_client)().stream_length > 10**6


@pytest.mark.parametrize("ttl_s", [0, -1, 10**18])
def test_commit_checks_its_times_before_it_writes(redis_client: redis.Redis, ttl_s: int) -> None:
    """A time that Redis refuses would leave a mark without an answer."""
    store = AnswerStore(redis_client, token="w", retention=lambda: Retention(result_ttl_s=ttl_s, done_ttl_s=ttl_s))
    with pytest.raises(redis.ResponseError, match="expected a time"):
        store.write([AnswerEntry(answer=Answer(id="j", status=Status.FAILED, attempts=1), id="j")])
    assert redis_client.dbsize() == 0


@pytest.mark.parametrize("done_ttl_s", [60, 900])
def test_mark_outlives_its_answer(redis_client: redis.Redis, done_ttl_s: int) -> None:
    """While an answer can be read its id counts as answered, also where the time of marks is set shorter."""
    retention = Retention(result_ttl_s=500, done_ttl_s=done_ttl_s)
    answer = Answer(id="j", status=Status.TAGGED, attempts=1)
    AnswerStore(redis_client, token="w", retention=lambda: retention).write([AnswerEntry(answer=answer, id="j")])
    assert 400 < redis_client.ttl(result_key("j")) <= 500
    longest_s = max(500, done_ttl_s)
    assert longest_s - 100 < redis_client.ttl(done_key("j")) <= longest_s


def test_deadline_without_a_valid_id_is_removed(redis_client: redis.Redis) -> None:
    """A member that is no job id, or whose message is nowhere, gets no answer and does not return each second."""
    redis_client.zadd(DEADLINES, {b"\xff\xfe": 1.0, b"i" * 256: 1.0, b"": 1.0, b"job": 1.0})
    maintenance = Maintenance(redis_client, AnswerStore(redis_client, token="s"), token="s")
    maintenance.run_once()
    assert redis_client.zcard(DEADLINES) == 0
    assert redis_client.xlen(RESULT_STREAM) == 0


def test_limits_without_access_do_not_stop_other_work(valkey: Valkey) -> None:
    """On a full server, or with an ACL that lacks the key, maintenance and cancels go on."""
    with valkey.client() as server, Client(valkey.url) as client:
        server.config_set("maxmemory-policy", "noeviction")
        server.config_set("maxmemory", 1)
        publisher = RetentionPublisher(server, Retention())
        worker = Maintenance(server, AnswerStore(server, token="w"), token="w", retention=publisher)
        assert worker.run_once().reaped == 0
        server.config_set("maxmemory", 0)
        server.set(RETENTION, "of a wrong type")
        assert client.cancel("j") == ["j"]


def test_worker_and_group_names_may_be_any_bytes(redis_url: str, redis_client: redis.Redis) -> None:
    """Names that are no UTF-8 are shown with replacement characters."""
    redis_client.zadd(WORKERS, {b"\xff": 1e15})
    redis_client.xgroup_create(RESULT_STREAM, b"\xfe", id="0", mkstream=True)
    write_dead_letters(redis_client, 30)
    with Client(redis_url) as client:
        assert client.queue_state().workers == ("\ufffd",)
    store = AnswerStore(redis_client, token="s")
    maintenance = Maintenance(redis_client, store, retention=lambda: Retention(stream_length=20))
    assert maintenance.trim() == {"\ufffd": 10}
