"""docs/redis-acl-cluster.conf on a real cluster: each user can do its work on all shards, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError

from shiwu import Client, Status
from shiwu.backfill.plan import Plan
from shiwu.backfill.runner import Phase
from shiwu.broker.sharding import PoolOptions, cluster_shard, open_shards
from shiwu.contract import CLAIMS, RESULT_STREAM, RETENTION, Lane, result_key
from shiwu.hooks.delivery_queue import NewDelivery, Payload, QueueOptions
from shiwu.hooks.process import make_group
from shiwu.hooks.shards import AllDeliveries, open_queues
from shiwu.watch.formats import read_message
from shiwu.watch.intake import Intake, Message
from shiwu.watch.rules import read_rules
from shiwu.watch.unread import read_unread
from tests.support import pictures
from tests.support.answering_shards import AnsweringShards
from tests.support.backfills import LocalBackfill, write_list
from tests.support.processes import LOOPBACK
from tests.support.redis_users import CONFIG_CLUSTER, users_for_cluster
from tests.support.servers import WorkerProcess
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.watch import access_event, run_watch, write_rules

pytestmark = pytest.mark.xdist_group(__name__)
SHARDS = 6
LIMITS = PoolOptions(timeout_s=5)
USERS = ("producer", "client", "consumer", "backfill", "hooks", "watcher", "sweep", "worker")


@pytest.fixture(scope="module")
def cluster_with_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three nodes with the users of the file."""
    folder: Path = tmp_path_factory.mktemp("acl-cluster")
    config = {"include": str(CONFIG_CLUSTER)}
    with ValkeyCluster(folder=folder, config=config, login=("shiwu-admin", "change-me-admin")) as running:
        yield running


@pytest.fixture
def cluster(cluster_with_users: ValkeyCluster) -> ValkeyCluster:
    """The cluster of this file, without keys and refusals of another test."""
    cluster_with_users.flush()
    for port in cluster_with_users.ports:
        cluster_with_users.ask(port, "ACL", "LOG", "RESET")
    return cluster_with_users


def url(cluster: ValkeyCluster, user: str) -> str:
    """Where a user asks."""
    return cluster.url(shards=SHARDS).replace("://", f"://shiwu-{user}:change-me-{user}@")


def refused(cluster: ValkeyCluster) -> list[tuple[str, str, str]]:
    """(user, command or key, reason) of each refusal on any node."""
    found: list[Any] = [entry for port in cluster.ports for entry in cluster.ask(port, "ACL", "LOG")]
    rows = [dict(zip(entry[::2], entry[1::2], strict=True)) if isinstance(entry, list) else entry for entry in found]
    return [
        (row[b"username"].decode(), row[b"object"].decode(), row[b"reason"].decode())
        for row in ({_bytes(key): value for key, value in row.items()} for row in rows)
    ]


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def test_acl_file_of_clusters_is_made_of_the_other() -> None:
    """After a change: python -m tests.support.redis_users > docs/redis-acl-cluster.conf."""
    assert CONFIG_CLUSTER.read_text(encoding="utf-8") == users_for_cluster()


def test_acl_users_can_work_on_all_shards(cluster: ValkeyCluster, tmp_path: Path) -> None:
    """Enqueue, wait, cancel, requeue, read the stream, sweep: no node refuses a command."""
    (tmp_path / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    image = (tmp_path / "x.png").as_uri()
    options: dict[str, Any] = {"allow_folders": tmp_path, "loaders": 1, "loader_spares": 0}
    with WorkerProcess(redis_url=url(cluster, "worker"), folder=tmp_path, torch_threads=1, **options) as worker:
        worker.wait_ready()
        with Client(url(cluster, "client")) as client, Client(url(cluster, "producer")) as producer:
            sent = list(producer.enqueue_many({"image": image, "id": f"p{n}"} for n in range(30)))
            sent += list(client.enqueue_many({"image": image, "id": f"c{n}"} for n in range(30)))
            answers = client.wait_many(sent, timeout_s=60)
            assert {answer.status for answer in answers.values()} == {Status.TAGGED}
            client.enqueue(image, id="later", countdown_s=600)
            assert client.cancel(["later"]) == ["later"]
            assert client.answer("later") is not None
            assert client.running_workers() == (worker.name,)
        with Client(url(cluster, "sweep")) as sweep:
            sweep.sweep()
            assert sweep.queue_state().waiting[Lane.BULK] == 0
        with Client(url(cluster, "consumer")) as consumer:
            found = set()
            for item in consumer.results(group="g", consumer="c", block_s=0.1, stop_when_idle=True):
                found.add(item.result.id)
                item.ack()
        assert found >= {*sent, "later"}
        assert cluster.ask(_owner(cluster, 0), "HGET", f"{cluster_shard(0).prefix}{RETENTION}", "shards") == b"6"
        assert worker.is_running
    assert refused(cluster) == []


def test_acl_users_of_extensions_can_work_on_all_shards(cluster: ValkeyCluster, tmp_path: Path) -> None:
    """A backfill that ends, and one that is cancelled while its jobs wait; a watcher; deliveries of webhooks."""
    with Client(url(cluster, "sweep")) as sweep:
        sweep.queue_state()  # stores the number of shards
    plan = Plan(str(write_list(tmp_path / "list.jsonl", 30)), out=str(tmp_path / "out"))
    with LocalBackfill(url(cluster, "backfill")) as backfill:
        assert backfill.run("night", plan, is_stopping=lambda: _has_sent(backfill)) is Phase.RUNNING
        backfill.state("night").want("cancel")
        assert backfill.run("night", plan) is Phase.CANCELLED
        with AnsweringShards(url(cluster, "worker")):
            assert backfill.run("day", Plan(plan.source)) is Phase.FINISHED
    rules = str(write_rules(tmp_path))
    done = run_watch(url(cluster, "watcher"), "http://127.0.0.1:0/", "--rules", rules, "--check")
    assert done.exit_code == 0, done.output
    with Client(url(cluster, "watcher")) as client, closing(open_shards(url(cluster, "watcher"), LIMITS)[0]) as keeper:
        intake = Intake(client, keeper, read_rules(tmp_path / "rules.yaml"), source="test")
        events = [access_event(f"{number}.jpg") for number in range(30)] + [b"nonsense"]
        intake.carry_out(intake.plan(Message(event, read_message(event)) for event in events))
        assert len(read_unread(keeper)) == 1
    shards = open_shards(url(cluster, "hooks"), LIMITS)
    queues = open_queues(shards, QueueOptions(alone_after=1))
    for shard, queue in zip(shards, queues, strict=True):
        make_group(shard, "acl", is_from_beginning=True)
        entries: Any = shard.xreadgroup("acl", "me", {RESULT_STREAM: ">"}, count=2)
        ids = [entry_id.decode() for entry_id, _ in entries[0][1]] if entries else []
        made = [NewDelivery(endpoint="a", id=job_id, payload=Payload(1), body=b"{}") for job_id in ids]
        queue.add(made, group="acl", entry_ids=ids or ["0-1"])
        for taken in queue.take("a", count=1):
            queue.give_up(taken, reason="http_410", is_disabling=True)
    assert AllDeliveries(queues).revive([], endpoints=["a"]) == 0
    for shard in shards:
        shard.close()
    assert refused(cluster) == []


def _has_sent(backfill: LocalBackfill) -> bool:
    return bool(backfill.shown and backfill.shown[-1].sent)


def _owner(cluster: ValkeyCluster, shard: int) -> int:
    return cluster.owner(cluster_shard(shard).slot or 0)


@pytest.mark.parametrize("user", USERS)
def test_acl_user_has_no_key_without_a_shard(cluster: ValkeyCluster, user: str) -> None:
    """Nor has a producer, consumer or client the claims of a shard."""
    port = _owner(cluster, 0)
    with redis.Redis(
        host=LOOPBACK, port=port, username=f"shiwu-{user}", password=f"change-me-{user}", socket_timeout=5
    ) as client:
        assert client.ping()
        for command in (("LPUSH", Lane.BULK.queue, "x"), ("HGETALL", CLAIMS), ("GET", result_key("x")), ("KEYS", "*")):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
    first, *others = open_shards(url(cluster, user), PoolOptions(timeout_s=5))
    try:
        if user not in {"worker", "sweep"}:
            with pytest.raises(NoPermissionError):
                first.hgetall(CLAIMS)
        else:
            assert first.hgetall(CLAIMS) == {}
    finally:
        for each in (first, *others):
            each.close()
        for each_port in cluster.ports:
            cluster.ask(each_port, "ACL", "LOG", "RESET")
