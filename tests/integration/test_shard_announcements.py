"""Announcements of answers in the shards of a real cluster: who gets them, by which commands, also over moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import msgspec
import pytest
import redis

from shiwu import Client
from shiwu.aio import waiter as aio_waiter
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.sharding import PoolOptions, ShardRedis, open_shards, shard_of
from shiwu.client import shard_waiter, waiter
from shiwu.contract import ANSWERED_CHANNEL, Answer, Lane, Status, result_key
from shiwu_worker.errors import FatalError
from shiwu_worker.pipeline.cancellations import CancellationListener
from tests.support.both_clients import OpenClient
from tests.support.redis_parts import make_lease_queue, message
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS = 3
AGES_S = 3600.0


@pytest.fixture
def shards(cluster: ValkeyCluster) -> Iterator[tuple[ShardRedis, ...]]:
    """A client of each shard. The commands of all nodes are counted anew."""
    clients = open_shards(cluster.url(shards=SHARDS), PoolOptions(timeout_s=5))
    for port in cluster.primaries():
        cluster.ask(port, "CONFIG", "RESETSTAT")
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def waiting(cluster: ValkeyCluster, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """One of the two clients, which looks for keys only when it begins to listen."""
    for module in (waiter, shard_waiter, aio_waiter):
        monkeypatch.setattr(module, "LISTENING_POLL_S", AGES_S)
    opened = open_client(cluster.url(shards=SHARDS), timeout_s=5.0)
    yield opened
    opened.close()


def id_in(shard: int, name: str) -> str:
    """An id of a shard."""
    return next(found for n in range(10_000) if shard_of(found := f"{name}{n}", shards=SHARDS) == shard)


def tagged(job_id: str) -> AnswerEntry:
    """An answer."""
    return AnswerEntry(id=job_id, answer=Answer(id=job_id, status=Status.TAGGED))


def write(client: ShardRedis, entry: AnswerEntry) -> None:
    """Commit an answer, as often as it takes while a slot moves."""

    def is_written() -> bool:
        try:
            AnswerStore(client, token="test").write([entry])
        except redis.RedisError:
            return False
        return True

    wait_until(is_written, timeout_s=30)


def is_subscribed(cluster: ValkeyCluster, shard: ShardRedis, channels: Sequence[str]) -> bool:
    """Whether the present node of a shard knows a listener for each of these channels."""
    names = [shard.shard.prefix + name for name in channels]
    counts = cluster.ask(cluster.owner(shard.shard.slot or 0), "PUBSUB", "SHARDNUMSUB", *names)
    return all(counts[1::2])


def calls(cluster: ValkeyCluster, command: str) -> int:
    """How often the nodes have run a command since the beginning of the test."""
    stats = [cluster.ask(port, "INFO", "COMMANDSTATS") for port in cluster.primaries()]
    return sum(each.get(f"cmdstat_{command}", {}).get("calls", 0) for each in stats)


@pytest.mark.parametrize("count", [1, SHARDS])
def test_answers_are_announced_also_after_a_move(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], waiting: Client, count: int
) -> None:
    """In one shard and in several. Nothing but announcements can end these waits; no message goes to all nodes."""

    def is_waited_for(job_id: str) -> bool:
        return is_subscribed(cluster, shards[shard_of(job_id, shards=SHARDS)], [result_key(job_id)])

    for is_moved in (False, True):
        ids = [id_in(shard, f"job{count}{is_moved}-") for shard in range(count)]
        found: list[str] = []

        def wait(ids: Sequence[str] = ids, found: list[str] = found) -> None:
            found += [job_id for job_id, _ in waiting.as_answered(ids, timeout_s=60)]

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        wait_until(lambda ids=ids: all(map(is_waited_for, ids)), timeout_s=30)
        if is_moved:
            slot = shards[0].shard.slot or 0
            cluster.move_atomically(slot, to=cluster.other_than(cluster.owner(slot)))
            wait_until(partial(is_waited_for, ids[0]), timeout_s=30, what="the client listens again")
        for job_id, shard in zip(ids, shards, strict=False):
            write(shard, tagged(job_id))
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert sorted(found) == sorted(ids)
    assert calls(cluster, "spublish") == 2 * count
    assert calls(cluster, "publish") == 0


def test_waits_that_end_keep_the_connection(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], waiting: Client
) -> None:
    """The end of a subscription that the client asked for is no sign of a moved slot."""
    ids = [id_in(0, f"end{n}-") for n in range(4)]
    for job_id in ids:
        assert dict(waiting.as_answered([job_id], timeout_s=0.2)) == {}
    if isinstance(waiting, Client):
        return
    wait_until(lambda: not is_subscribed(cluster, shards[0], [result_key(ids[-1])]), timeout_s=10)
    listeners = [line for port in cluster.primaries() for line in pubsub_clients(cluster, port)]
    assert len(listeners) <= 1


def pubsub_clients(cluster: ValkeyCluster, port: int) -> list[str]:
    """The connections of a node that have subscribed."""
    return [line for line in cluster.ask(port, "CLIENT", "LIST").decode().splitlines() if "ssub=0" not in line]


def test_celery_clients_get_messages_of_all_nodes(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """Only for jobs with `reply_to`, and for answers of writers that do not know the job."""
    stock, own, cancelled = (id_in(0, name) for name in ("stock", "own", "cancelled"))
    other = cluster.other_than(cluster.owner(shards[0].shard.slot or 0))
    with redis.Redis(port=other, socket_timeout=5) as client, closing(client.pubsub()) as listening:  # type: ignore[no-untyped-call]  # redis' own
        listening.psubscribe(f"{shards[0].shard.prefix}*")
        assert listening.get_message(timeout=5)["type"] == "psubscribe"
        write(shards[0], tagged(own))
        write(shards[0], msgspec.structs.replace(tagged(stock), has_reply_to=True))
        write(shards[0], msgspec.structs.replace(tagged(cancelled), is_from_outside=True))
        channels = [listening.get_message(timeout=5)["channel"].decode() for _ in range(2)]
    assert channels == [shards[0].shard.prefix + result_key(job_id) for job_id in (stock, cancelled)]
    assert calls(cluster, "spublish") == 4, "three answers, and one note to the worker that may hold the job"


def test_duplicates_are_announced_to_all(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], waiting: Client
) -> None:
    """Also to a client that began to wait after the first answer had expired."""
    job_id = id_in(1, "again")
    write(shards[1], tagged(job_id))
    shards[1].delete(result_key(job_id))
    found: dict[str, object] = {}
    thread = threading.Thread(target=lambda: found.update(waiting.as_answered([job_id], timeout_s=60)), daemon=True)
    thread.start()
    wait_until(lambda: is_subscribed(cluster, shards[1], [result_key(job_id)]), timeout_s=30)
    shards[1].lpush(Lane.BULK.keys[0], message(job_id))
    assert make_lease_queue(shards[1], "worker").claim(1).jobs == ()
    thread.join(timeout=30)
    assert list(found) == [job_id]


def test_workers_hear_of_cancelled_jobs_after_a_move(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """On the channel of their shard."""
    heard: list[str] = []
    fatal: list[FatalError] = []
    listener = CancellationListener(shards[2], on_answered_elsewhere=heard.extend, on_fatal=fatal.append)
    listener.start()
    try:
        for name in ("before", "after"):
            job_id = id_in(2, name)
            wait_until(partial(is_subscribed, cluster, shards[2], [ANSWERED_CHANNEL]), timeout_s=30)
            write(shards[2], msgspec.structs.replace(tagged(job_id), is_from_outside=True))
            wait_until(lambda job_id=job_id: job_id in heard, timeout_s=30)
            slot = shards[2].shard.slot or 0
            cluster.move_atomically(slot, to=cluster.other_than(cluster.owner(slot)))
    finally:
        listener.close()
    assert fatal == []
