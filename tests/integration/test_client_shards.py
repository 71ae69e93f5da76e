"""Both clients over the shards of a real cluster: every job is in one shard, and every answer is found."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import redis

from shiwu import Client, DeadFilter, QueueFull
from shiwu.broker.redis_errors import WrongShardCount
from shiwu.broker.sharding import ShardRedis, cluster_shard, shard_of
from shiwu.client.job_report import JobState
from shiwu.contract import CLAIMS, Lane
from tests.support.answering_shards import AnsweringShards
from tests.support.both_clients import OpenClient
from tests.support.redis_parts import message
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS = 6
KEPT = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture(scope="module")
def cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries that keep their data over a crash."""
    with ValkeyCluster(folder=tmp_path_factory.mktemp("cluster"), config=KEPT) as running:
        yield running


@pytest.fixture
def cluster(cluster_session: ValkeyCluster) -> ValkeyCluster:
    """The cluster of this file, without keys."""
    wait_until(lambda: is_complete(cluster_session), timeout_s=60, what="all nodes are back")
    cluster_session.flush()
    return cluster_session


@pytest.fixture
def url(cluster: ValkeyCluster) -> str:
    """What clients are given."""
    return cluster.url(shards=SHARDS)


@pytest.fixture
def client(url: str, open_client: OpenClient) -> Iterator[Client]:
    """One of the two clients."""
    opened = open_client(url, timeout_s=5.0)
    yield opened
    opened.close()


def is_complete(cluster: ValkeyCluster) -> bool:
    """Whether all nodes serve their slots."""
    try:
        return all(b"cluster_state:ok" in cluster.ask(port, "CLUSTER", "INFO") for port in cluster.ports)
    except redis.RedisError:
        return False


def ids_of(shard: int, *, count: int = 1, prefix: str = "job") -> list[str]:
    """Ids that belong to a shard."""
    found = (f"{prefix}{number}" for number in range(100_000))
    own = (job_id for job_id in found if shard_of(job_id, shards=SHARDS) == shard)
    return [next(own) for _ in range(count)]


def images(count: int, *, prefix: str = "job") -> list[dict[str, str]]:
    """Items of `enqueue_many` with ids."""
    return [{"id": f"{prefix}{n}", "image": f"s3://pictures/{n}.jpg"} for n in range(count)]


def test_jobs_are_in_the_shard_of_their_id_and_counted_over_all(client: Client, shards: tuple[ShardRedis, ...]) -> None:
    """The ids come back in the order of the images."""
    items = images(300)
    assert list(client.enqueue_many(items, batch_size=70)) == [item["id"] for item in items]
    wanted = Counter(shard_of(item["id"], shards=SHARDS) for item in items)
    assert [shard.llen(Lane.BULK.keys[0]) for shard in shards] == [wanted[n] for n in range(SHARDS)]
    state = client.queue_state()
    assert (state.waiting[Lane.BULK], state.waiting[Lane.INTERACTIVE]) == (300, 0)
    assert [each.waiting[Lane.BULK] for each in state.shards] == [wanted[n] for n in range(SHARDS)]
    assert state.oldest_age_s[Lane.BULK] == max(each.oldest_age_s[Lane.BULK] for each in state.shards)


def test_each_shard_holds_an_equal_part_of_the_limit(
    cluster: ValkeyCluster, url: str, open_client: OpenClient, shards: tuple[ShardRedis, ...]
) -> None:
    """A full shard refuses, and then no other has got anything of the portion; another shard still has space."""
    opened = open_client(url, max_waiting=2 * SHARDS)
    try:
        full, other = ids_of(0, count=3), ids_of(1, count=2)
        for job_id in full[:2]:
            opened.enqueue("s3://pictures/a.jpg", id=job_id)
        with pytest.raises(QueueFull, match=r"lane interactive of shard 0, which holds 2 of 2"):
            list(opened.enqueue_many([{"id": i, "image": "s3://b/k"} for i in (other[0], full[2])], lane="interactive"))
        assert shards[1].llen(Lane.INTERACTIVE.keys[0]) == 0
        opened.enqueue("s3://pictures/a.jpg", id=other[0])
    finally:
        opened.close()


def test_waits_get_the_answers_of_all_shards(client: Client, url: str) -> None:
    """Those that are there and those that come."""
    first = list(client.enqueue_many(images(60, prefix="first"), lane="interactive"))
    with AnsweringShards(url):
        assert set(client.wait_many(first, timeout_s=60)) == set(first)
        later = list(client.enqueue_many(images(60, prefix="later"), lane="interactive"))
        found = [job_id for job_id, _ in client.as_answered([*later, *first], timeout_s=60)]
    assert Counter(found) == Counter([*first, *later])
    assert client.answer(first[0]) is not None
    assert client.answer("unknown") is None


def test_a_wait_ends_with_what_has_come(client: Client, url: str) -> None:
    """Ids without a job hold up no other, and no connection is left in use."""
    with AnsweringShards(url):
        ids = list(client.enqueue_many(images(20), lane="interactive"))
        for _ in range(3):
            found = dict(client.as_answered([*ids, *(f"never{n}" for n in range(20))], timeout_s=1.0))
    assert set(found) == set(ids)


def test_results_of_all_shards_come_over_the_crash_of_a_node(
    client: Client, url: str, cluster: ValkeyCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A node is killed while answers are made and read, and starts again. Each id is read at least once and acked."""
    wanted = {item["id"] for item in images(600)}
    killed = cluster.owner(cluster_shard(0).slot or 0)
    seen: Counter[str] = Counter()
    shards_seen: set[str] = set()

    def restart() -> None:
        cluster.server(killed).kill()
        threading.Event().wait(1.5)
        cluster.server(killed).start()

    assert set(client.enqueue_many(images(600), batch_size=100)) == wanted
    crash = threading.Thread(target=restart)
    with AnsweringShards(url, batch=10):
        for item in client.results(group="archive", consumer="one", block_s=0.2):
            seen[item.result.id] += 1
            shards_seen.add(item.entry_id.partition("/")[0])
            item.ack(away_s=60.0)
            if sum(seen.values()) == 100:
                crash.start()
            if set(seen) == wanted and not crash.is_alive():
                break
        crash.join()
    assert shards_seen == {str(index) for index in range(SHARDS)}
    assert set(seen) == wanted
    # The reply to a read or to an acknowledgement may be lost with the node; nothing else comes twice.
    assert sum(seen.values()) - len(seen) <= 100
    again = list(client.results(group="archive", consumer="one", block_s=0.05, stop_when_idle=True))
    assert len(again) <= 1, "everything but what the loop above left was acknowledged"


def test_loop_that_stops_when_idle_waits_for_a_lost_shard(
    client: Client, url: str, cluster: ValkeyCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets the answers of the others meanwhile, says once that a shard is away, and ends when all have answered."""
    ids = list(client.enqueue_many(images(60), lane="interactive"))
    with AnsweringShards(url):
        client.wait_many(ids, timeout_s=60)
    stopped = cluster.owner(cluster_shard(0).slot or 0)
    cluster.server(stopped).kill()
    away = {i for i in ids if cluster_owner(cluster, i, but=stopped)}
    seen: list[str] = []
    is_back = False
    for item in client.results(group="idle", block_s=0.05, stop_when_idle=True):
        seen.append(item.result.id)
        item.ack()
        if not is_back and len(away & set(seen)) == len(away):
            cluster.server(stopped).start()
            is_back = True
    assert Counter(seen) == Counter(ids)
    assert is_back
    texts = [record.getMessage() for record in caplog.records if record.name == "shiwu"]
    assert len([text for text in texts if text.startswith("shard 0:")]) == 1


def cluster_owner(cluster: ValkeyCluster, job_id: str, *, but: int) -> bool:
    """Whether the shard of an id is on another node than this one."""
    return cluster.owner(cluster_shard(shard_of(job_id, shards=SHARDS)).slot or 0) != but


def test_cancelled_jobs_are_answered_in_their_shard(client: Client, url: str) -> None:
    """Each once, in the caller's order; a second call finds them answered."""
    ids = list(client.enqueue_many(images(30)))
    assert client.cancel([*ids, "never-sent"]) == [*ids, "never-sent"]
    assert client.cancel(ids) == []
    assert {result.status for result in client.wait_many(ids, timeout_s=30).values()} == {"cancelled"}


def test_jobs_of_a_stock_application_are_found_in_its_shard(client: Client, shards: tuple[ShardRedis, ...]) -> None:
    """It put them into the one shard that it has, not into that of their id."""
    [job_id] = ids_of(1, prefix="stock")
    shards[4].hset(CLAIMS, job_id, b"token.1|1|shiwu.bulk|" + message(job_id))
    assert client.explain(job_id).state is JobState.CLAIMED
    assert client.cancel(job_id) == [job_id]
    result = client.answer(job_id)
    assert result is not None
    assert result.status == "cancelled"
    assert client.cancel(job_id) == []
    assert [shard.exists(f"celery-task-meta-{job_id}") for shard in shards] == [0, 0, 0, 0, 1, 0]


def test_dead_letters_of_all_shards_come_by_time(client: Client, url: str) -> None:
    """Newest first, up to the limit; by id they are found, requeued and dropped in their shard."""
    broken = [{"id": f"d{n}", "image": f"s3://pictures/broken{n}.jpg"} for n in range(40)]
    ids = []
    with AnsweringShards(url):
        for portion in (broken[:20], broken[20:]):
            ids += list(client.enqueue_many(portion))
            client.wait_many(ids, timeout_s=60)
    letters = list(client.dead_letters())
    assert Counter(letter.id for letter in letters) == Counter(ids)
    assert [letter.died_ms for letter in letters] == sorted((letter.died_ms for letter in letters), reverse=True)
    assert [letter.id for letter in client.dead_letters(limit=7)] == [letter.id for letter in letters[:7]]
    assert list(client.dead_letters(DeadFilter(code="source_too_large"))) == []
    shown = client.dead_letter(ids[3])
    assert shown is not None
    assert shown.id == ids[3]
    assert client.dead_letter("other") is None
    assert client.requeue([*ids[:10], "other"]) == ids[:10]
    assert client.drop(ids[10:]) == 30
    assert client.queue_state().dead == 0
    assert client.queue_state().waiting[Lane.BULK] == 10


def test_sweep_requeues_jobs_of_crashed_workers_in_all_shards(client: Client, shards: tuple[ShardRedis, ...]) -> None:
    """One claimed job in each, whose lease has expired."""
    for shard in shards:
        [job_id] = ids_of(shard.shard.index)
        shard.hset(CLAIMS, job_id, b"token.1|1|shiwu.bulk|" + message(job_id))
        shard.zadd("shiwu:leases", {job_id: 1})
    assert client.sweep().reaped == SHARDS
    assert client.queue_state().waiting[Lane.BULK] == SHARDS


def test_another_number_of_shards_is_refused(client: Client, cluster: ValkeyCluster, open_client: OpenClient) -> None:
    """The first client stores the number."""
    client.enqueue("s3://pictures/a.jpg")
    other = open_client(cluster.url(shards=SHARDS + 1))
    try:
        for call in (lambda: other.enqueue("s3://pictures/a.jpg"), lambda: other.wait("a", timeout_s=1)):
            with pytest.raises(WrongShardCount, match=f"expected {SHARDS} shards"):
                call()
    finally:
        other.close()


def test_other_shards_take_jobs_while_one_is_away(
    client: Client, cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]
) -> None:
    """The job of the shard that is away raises the error; the others are enqueued and answered."""
    client.queue_state()
    stopped = cluster.owner(shards[0].shard.slot or 0)
    cluster.server(stopped).kill()
    try:
        for shard in range(SHARDS):
            [job_id] = ids_of(shard)
            if cluster_owner(cluster, job_id, but=stopped):
                assert client.enqueue("s3://pictures/a.jpg", id=job_id) == job_id
            else:
                with pytest.raises(redis.RedisError):
                    client.enqueue("s3://pictures/a.jpg", id=job_id)
    finally:
        cluster.server(stopped).start()
