"""Workers on the shards of a real cluster: each job is answered once, whatever happens to nodes and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
import redis

from shiwu.broker.message_writer import build_message
from shiwu.broker.sharding import PoolOptions, ShardRedis, cluster_shard, open_shards, shard_of
from shiwu.contract import CLAIMS, LEASES, RESULT_STREAM, Lane, Request
from tests.conftest import StartWorker
from tests.support.picture_server import PictureServer, Reply
from tests.support.pictures import picture, png
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group(__name__)
SHARDS: Final = 6
JOBS: Final = 300
ANSWERED_S: Final = 120.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ValkeyCluster]:
    """Three primaries, each of which keeps its data over a kill."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    with ValkeyCluster(folder=tmp_path / "cluster", config=config) as running:
        yield running


class Shards:
    """A producer on all shards, and the reader of their answers."""

    def __init__(self, url: str, image: str) -> None:
        self.clients: tuple[ShardRedis, ...] = open_shards(url, PoolOptions(timeout_s=5.0))
        self.image = image

    def close(self) -> None:
        """Close the connections."""
        for client in self.clients:
            client.close()

    def enqueue(self, ids: Sequence[str], *, lane: Lane = Lane.BULK) -> None:
        """Send jobs, each to the shard of its id."""
        for job_id in ids:
            message = build_message(Request(image=self.image), job_id=job_id, lane=lane)
            self.clients[shard_of(job_id, shards=SHARDS)].lpush(lane.queue, message)

    def answered(self, *, among: Sequence[int] = range(SHARDS)) -> Counter[str]:
        """Id → number of answers in the streams of these shards."""
        return Counter(
            fields[b"id"].decode()
            for index in among
            for _, fields in self.clients[index].xrange(RESULT_STREAM)  # type: ignore[union-attr]  # not awaited
        )

    def all_answer(self) -> bool:
        """Whether every shard can be used."""
        try:
            return all(client.xlen(RESULT_STREAM) >= 0 for client in self.clients)  # type: ignore[operator]  # not awaited
        except redis.RedisError:
            return False

    def wait_answered(self, ids: Sequence[str]) -> None:
        """Wait until each of these ids has an answer, and check that none has two and that nothing is held."""
        wait_until(
            lambda: set(ids) <= set(self.answered()), timeout_s=ANSWERED_S, every_s=0.2, what=f"{len(ids)} answers"
        )
        assert set(self.answered().values()) == {1}
        wait_until(lambda: not any(client.hlen(CLAIMS) for client in self.clients), timeout_s=30, what="no job is held")


@pytest.fixture
def shards(cluster: ValkeyCluster, picture_server: PictureServer) -> Iterator[Shards]:
    """A producer whose jobs have one small image."""
    data = png(picture("熊猫").resize((48, 48)))
    url = picture_server.serve("/shards.png", Reply.picture(data, content_type="image/png"))
    with ExitStack() as stack:
        producer = Shards(cluster.url(shards=SHARDS), url)
        stack.callback(producer.close)
        yield producer


def ids_of(kind: str, count: int = JOBS) -> list[str]:
    """Ids of a test."""
    return [f"{kind}-{number}" for number in range(count)]


def shards_on(cluster: ValkeyCluster, port: int) -> list[int]:
    """The shards whose slots this node has."""
    return [index for index in range(SHARDS) if cluster.owner(cluster_shard(index).slot or 0) == port]


def test_jobs_of_all_shards_are_answered_once(
    cluster: ValkeyCluster, shards: Shards, start_worker: StartWorker
) -> None:
    """By two workers, of which one watches each shard. When one is killed, the other watches all of them."""
    workers = [start_worker(redis_url=cluster.url(shards=SHARDS), watchers=1, ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready(timeout_s=180)
    bulk, interactive = ids_of("bulk"), ids_of("interactive", 60)
    shards.enqueue(bulk)
    shards.enqueue(interactive, lane=Lane.INTERACTIVE)
    shards.wait_answered([*bulk, *interactive])
    assert {shard_of(job_id, shards=SHARDS) for job_id in bulk} == set(range(SHARDS))
    workers[0].kill()
    taken: list[str] = []
    for client in shards.clients:
        lost = next(job_id for job_id in ids_of("lost") if shard_of(job_id, shards=SHARDS) == client.shard.index)
        message = build_message(Request(image=shards.image), job_id=lost, lane=Lane.BULK)
        client.hset(CLAIMS, lost, b"gone.1|1|shiwu.bulk|" + message)
        client.zadd(LEASES, {lost: 1})
        taken.append(lost)
    shards.wait_answered([*bulk, *interactive, *taken])


@pytest.mark.slow
def test_killed_primary_and_killed_worker_cost_no_answer(
    cluster: ValkeyCluster, shards: Shards, start_worker: StartWorker
) -> None:
    """Its shards are away until it is back, and others go on meanwhile; the jobs of the killed worker are requeued."""
    workers = [start_worker(redis_url=cluster.url(shards=SHARDS), lease_s=6, ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready(timeout_s=180)
    before = ids_of("before")
    shards.enqueue(before)
    wait_until(lambda: len(shards.answered()) >= JOBS // 10, timeout_s=ANSWERED_S, what="a tenth of the answers")
    node = cluster.server(cluster.ports[1])
    away = shards_on(cluster, node.port)
    node.kill()
    workers[0].kill()
    others = [job_id for job_id in ids_of("meanwhile", 90) if shard_of(job_id, shards=SHARDS) not in away]
    shards.enqueue(others)
    reachable = [index for index in range(SHARDS) if index not in away]
    wait_until(
        lambda: set(others) <= set(shards.answered(among=reachable)),
        timeout_s=ANSWERED_S,
        every_s=0.2,
        what="the answers of the other shards",
    )
    node.start()
    wait_until(shards.all_answer, timeout_s=30, what="all shards answer")
    after = ids_of("after", 60)
    shards.enqueue(after)
    shards.wait_answered([*before, *others, *after])
    log = workers[1].log_text()
    assert log.count('"shard_away"') == len(away)
    assert log.count('"shard_back"') == len(away)


@pytest.mark.long
def test_frozen_node_holds_up_no_other_shard(cluster: ValkeyCluster, shards: Shards, start_worker: StartWorker) -> None:
    """Jobs of the others are answered while it hangs, within the usual time; its own when it goes on."""
    start_worker(redis_url=cluster.url(shards=SHARDS))
    node = cluster.server(cluster.ports[2])
    away = shards_on(cluster, node.port)
    reachable = [index for index in range(SHARDS) if index not in away]
    mine = [job_id for job_id in ids_of("frozen", 60) if shard_of(job_id, shards=SHARDS) in away]
    shards.enqueue(mine)
    wait_until(lambda: len(shards.answered()) >= 3, timeout_s=ANSWERED_S, what="the first answers")
    node.pause()
    others = [job_id for job_id in ids_of("other", 90) if shard_of(job_id, shards=SHARDS) not in away]
    shards.enqueue(others)
    wait_until(
        lambda: set(others) <= set(shards.answered(among=reachable)),
        timeout_s=ANSWERED_S,
        every_s=0.05,
        what="the answers of the other shards while the node stands still",
    )
    node.resume()
    shards.wait_answered([*mine, *others])
