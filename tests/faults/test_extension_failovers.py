"""Extensions on a real cluster whose nodes fail: all go on without a restart, and each keeps its promise.

Every answer has a vector, so one run serves a backfill, webhooks, the sink of vectors, a watcher and `shiwu top`.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

import msgspec
import pyarrow.parquet as pq
import pytest
import redis

from shiwu.broker.sharding import PoolOptions, ShardRedis, open_shards, shard_of
from shiwu.contract import BACKFILL, HOOKS_DELIVERIES, RESULT_STREAM, Answer, ModelInfo
from shiwu.top.shards import ShardsReader
from tests.support.answering_shards import AnsweringShards
from tests.support.backfills import BackfillProcess, references_of, rows_of, summary_of, write_list
from tests.support.hooks import HooksProcess, unread, write_endpoints
from tests.support.redis_server import RedisServer
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.vector_answers import GROUP, sink_process
from tests.support.waiting import wait_until
from tests.support.watch import KEY, access_event, watch_process, write_rules
from tests.support.webhook_receiver import WebhookReceiver

SHARDS: Final = 6
COUNT: Final = 900
EVENTS: Final = 100
NODE_TIMEOUT_MS: Final = 3_000
"""In a shorter time a busy machine may not reply, and a node that lives would be replaced."""
VECTOR: Final = base64.b64encode(bytes(16)).decode()


@pytest.fixture(scope="module")
def cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries with a replica each, for all tests of this file."""
    config = {"cluster-node-timeout": str(NODE_TIMEOUT_MS)}
    with ValkeyCluster(folder=tmp_path_factory.mktemp("cluster"), replicas=3, config=config) as running:
        yield running


@pytest.fixture
def cluster(cluster_session: ValkeyCluster) -> ValkeyCluster:
    """The cluster without keys, and with the nodes that a test before has killed."""
    for port in cluster_session.ports:
        server = cluster_session.server(port)
        if not server.is_running:
            server.start()
        cluster_session.ask(port, "CONFIG", "SET", "primaryauth", "", "min-replicas-to-write", 0)
    cluster_session.wait_complete()
    cluster_session.flush()
    return cluster_session


def with_vector(answer: Answer) -> Answer:
    """An answer as to a request that wants its vector."""
    return msgspec.structs.replace(answer, vector=VECTOR, model=ModelInfo(id="m", revision="r", dtype="f", device="c"))


@contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    """Let a node hang for the block."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


class Extensions:
    """All of them as processes, and what they have done. None is restarted."""

    def __init__(self, cluster: ValkeyCluster, folder: Path) -> None:
        self._stack = ExitStack()
        self.url = cluster.url(shards=SHARDS)
        self.shards: tuple[ShardRedis, ...] = open_shards(self.url, PoolOptions(timeout_s=5))
        self.receiver = WebhookReceiver()
        self.rows = folder / "rows"
        self.vectors = folder / "vectors"
        self._folder = folder
        endpoints = write_endpoints(folder, [{"name": "a", "url": self.receiver.url}])
        self.hooks = HooksProcess(redis_url=self.url, file=endpoints, args="--from-beginning", in_flight=50)
        args = ["--part-rows", "150", "--part-age", "1"]
        self.sink = sink_process(self.url, folder, self.vectors, *args)
        images = write_list(folder / "list.jsonl", COUNT)
        args = ["--out", str(self.rows), "--part-rows", "150", "--rate", "150/s"]
        self.backfill = BackfillProcess(
            "start", "night", str(images), *args, redis_url=self.url, folder=folder, name="backfill"
        )

    def __enter__(self) -> Self:
        for client in self.shards:
            self._stack.enter_context(client)
        self._stack.enter_context(self.receiver)
        self._stack.enter_context(AnsweringShards(self.url, more=with_vector))
        for process in (self.hooks, self.sink, self.backfill):
            self._stack.callback(process.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def has_groups(self) -> bool:
        """Whether webhooks and vectors are read in every shard."""
        if not all(shard.exists(RESULT_STREAM) for shard in self.shards):
            return False
        names = [{group["name"] for group in shard.xinfo_groups(RESULT_STREAM)} for shard in self.shards]
        return all({b"hooks", GROUP.encode()} <= each for each in names)

    @property
    def is_busy(self) -> bool:
        """Whether each has something behind it, and the backfill has something before it."""
        return len(self.receiver.received) > 150 and any(self.vectors.glob("*.parquet")) and self.backfill.is_running

    @property
    def is_idle(self) -> bool:
        """Whether no answer is left to read, and no delivery to make."""
        try:
            return not any(
                unread(shard) or unread(shard, GROUP) or shard.hlen(HOOKS_DELIVERIES) for shard in self.shards
            )
        except redis.RedisError:
            return False

    def check_rows(self) -> None:
        """The backfill has ended by itself, with one row for each image, and counts that say so."""
        assert self.backfill.wait(timeout_s=120) == 0, self.backfill.log_tail()
        found = references_of(self.rows)
        assert (len(found), set(found.values())) == (COUNT, {1})
        counts = summary_of(self.rows)
        assert (counts["read"], counts["answered"], counts["rows"]) == (COUNT, COUNT, COUNT)
        assert counts["by_status"] == {"tagged": COUNT}

    def row_ids(self) -> list[str]:
        """The ids of the jobs of the backfill."""
        return [row["id"] for row in rows_of(self.rows)]

    def check_webhooks(self, job_ids: list[str]) -> None:
        """Each of these answers came at least once, and a webhook id always with the same answer."""
        assert self.hooks.is_running, self.hooks.log_tail()
        answers: dict[str, set[str]] = defaultdict(set)
        for got in self.receiver.received:
            answers[got.id].add(json.loads(got.body)["data"]["id"])
        assert answers.keys() == {f"{job_id}.0" for job_id in job_ids}
        assert all({f"{each}.0" for each in found} == {webhook_id} for webhook_id, found in answers.items())

    def vector_counts(self) -> Counter[str]:
        """How often the vector of each answer is stored, once the sink has ended as asked."""
        assert self.sink.is_running, self.sink.log_tail()
        assert self.sink.stop() == 0, self.sink.log_tail()
        names = [pq.read_table(path).column("id").to_pylist() for path in self.vectors.glob("*.parquet")]
        return Counter(name for each in names for name in each)


@pytest.mark.parametrize("least_replicas", [0, pytest.param(1, marks=pytest.mark.long)])
def test_extensions_go_on_when_the_node_of_shard_0_fails(
    cluster: ValkeyCluster, redis_url: str, redis_client: redis.Redis, tmp_path: Path, least_replicas: int
) -> None:
    """Its replica has all that was acknowledged, and takes over: so each vector is stored once.

    With `min-replicas-to-write` it takes no writes before the dead node is back.
    """
    for port in cluster.ports:
        cluster.ask(port, "CONFIG", "SET", "min-replicas-to-write", least_replicas)
    with Extensions(cluster, tmp_path) as run:
        slot = run.shards[0].shard.slot or 0
        write_rules(tmp_path)
        source = f"{redis_url}?key={KEY}"
        with ShardsReader(run.shards) as top, watch_process(run.url, source, folder=tmp_path) as watcher:
            run.hooks.start()
            run.sink.start()
            wait_until(lambda: run.has_groups, timeout_s=60)
            run.backfill.start()
            wait_until(lambda: run.is_busy, timeout_s=60)
            assert top.look().problem is None
            dead = cluster.kill_primary(slot)
            redis_client.rpush(KEY, *(access_event(f"event-{number}.jpg") for number in range(EVENTS)))
            assert "shard 0: redis_away" in (top.look().problem or "")
            cluster.wait_failed_over(slot, dead=dead)
            if least_replicas:
                wait_until(lambda: "redis_not_replicated" in run.sink.log_text(), timeout_s=60)
                cluster.server(dead).start()
            at_failover = len(run.receiver.received)
            wait_until(lambda: len(run.receiver.received) > at_failover + 100, timeout_s=60)
            assert top.look().problem is None
            run.check_rows()
            wait_until(lambda: not redis_client.llen(KEY) and run.is_idle, timeout_s=60)
            events = [got.id.removesuffix(".0") for got in run.receiver.received if got.id.startswith("ev.")]
            assert len(set(events)) == EVENTS
            job_ids = [*run.row_ids(), *set(events)]
            run.check_webhooks(job_ids)
            assert run.vector_counts() == Counter(job_ids)
            assert watcher.stop() == 0
            assert top.look().problem is None


@pytest.mark.long
def test_writes_that_a_failover_loses_are_made_again(cluster: ValkeyCluster, tmp_path: Path) -> None:
    """The replica has neither the groups of webhooks and vectors, nor the newest portions, parts, jobs and answers.

    What was answered twice may be stored twice, as the documentation says, and only in shards of this node. Afterwards
    the new primary hangs for longer than a command may take.
    """
    with Extensions(cluster, tmp_path) as run:
        slot = run.shards[0].shard.slot or 0
        dead = cluster.owner(slot)
        lost = {n for n in range(SHARDS) if cluster.owner(run.shards[n].shard.slot or 0) == dead}
        run.backfill.start()
        wait_until(lambda: int(run.shards[0].hget(f"{BACKFILL}night", "portion") or 0) > 1, timeout_s=60)
        cluster.cut_off_replica(slot)
        run.hooks.start()
        run.sink.start()
        wait_until(lambda: run.is_busy, timeout_s=60)
        cluster.server(dead).kill()
        cluster.wait_failed_over(slot, dead=dead)
        successor = cluster.server(cluster.owner(slot))
        with paused(successor), pytest.raises(redis.RedisError):
            run.shards[0].ping()
        run.check_rows()
        assert "beginning again with what is left" in run.backfill.log_text()
        wait_until(lambda: run.has_groups and run.is_idle, timeout_s=60)
        job_ids = run.row_ids()
        run.check_webhooks(job_ids)
        counts = run.vector_counts()
        assert counts.keys() == set(job_ids)
        assert {shard_of(job_id, shards=SHARDS) for job_id, count in counts.items() if count > 1} <= lost
