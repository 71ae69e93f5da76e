"""`shiwu-hooks` over the shards of a real cluster: at least once with one id, and endpoints that fail are spared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from standardwebhooks import Webhook

from shiwu.broker.sharding import ShardRedis, by_shard
from shiwu.cli import main
from shiwu.contract import HOOKS_DELIVERIES, HOOKS_HEALTH, RESULT_STREAM
from shiwu.hooks.delivery_queue import DeliveryQueue, NewDelivery, Payload, QueueOptions
from shiwu.hooks.shards import AllDeliveries, open_queues
from tests.support.hooks import SECRET, HooksProcess, answer, commit, unread, write_endpoints
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import Answered, WebhookReceiver

SHARDS = 6


@pytest.fixture
def url(cluster: ValkeyCluster) -> str:
    """What the process is given."""
    return cluster.url(shards=SHARDS)


def commit_in_shards(shards: Sequence[ShardRedis], ids: Sequence[str]) -> None:
    """Let answers end their jobs, each in the shard of its id."""
    for shard, group in by_shard(ids, shards=SHARDS, id_of=str).items():
        commit(shards[shard], *map(answer, group))


def is_done(shards: Sequence[ShardRedis]) -> bool:
    """Whether no delivery waits, and all answers are read and acknowledged."""
    return not any(shard.hlen(HOOKS_DELIVERIES) or unread(shard) for shard in shards)


def test_killed_process_loses_no_delivery_of_any_shard(
    url: str, shards: tuple[ShardRedis, ...], tmp_path: Path
) -> None:
    """Single deliveries and lists; a webhook id always has the same answers."""
    ids = [f"k{number}" for number in range(200)]
    with WebhookReceiver() as receiver:
        single, many = f"{receiver.url}/single", f"{receiver.url}/many"
        file = write_endpoints(tmp_path, [{"name": "single", "url": single}, {"name": "many", "url": many, "batch": 5}])
        # Tries of half a second may fail several times on a busy machine.
        schedule = "0s," + ",".join(["0.1s"] * 40)
        with HooksProcess(redis_url=url, file=file, lease_s=1, timeout_s=0.5, schedule=schedule) as process:
            process.wait_started()
            wait_until(lambda: all(shard.exists(RESULT_STREAM) for shard in shards), timeout_s=20)
            commit_in_shards(shards, ids[:100])
            wait_until(lambda: len(receiver.received) > 30, timeout_s=20, every_s=0.001)
            process.kill()
            commit_in_shards(shards, ids[100:])
            process.start()
            wait_until(lambda: is_done(shards), timeout_s=60)
            assert process.stop() == 0
        answers: dict[tuple[str, str], list[str]] = {}
        for got in receiver.received:
            data = Webhook(SECRET).verify(got.body, dict(got.headers))["data"]
            found = [each["id"] for each in (data if isinstance(data, list) else [data])]
            assert answers.setdefault((got.path, got.id), found) == found
    for path in ("/hook/single", "/hook/many"):
        assert sorted(job_id for (where, _), found in answers.items() if where == path for job_id in found) == sorted(
            ids
        )


def test_gone_endpoint_is_disabled_in_all_shards(url: str, shards: tuple[ShardRedis, ...], tmp_path: Path) -> None:
    """After one 410; `shiwu hooks` shows and retries the deliveries of all shards."""
    ids = [f"k{number}" for number in range(60)]

    def shiwu(*args: str) -> str:
        done = CliRunner().invoke(main, ["--redis-url", url, "hooks", *args])
        assert done.exit_code == 0, done.output
        return done.stdout

    with WebhookReceiver(lambda _: Answered(410)) as receiver:
        file = write_endpoints(tmp_path, [{"name": "a", "url": receiver.url}])
        with HooksProcess(redis_url=url, file=file, in_flight=1) as process:
            process.wait_started()
            wait_until(lambda: all(shard.exists(RESULT_STREAM) for shard in shards), timeout_s=20)
            commit_in_shards(shards, ids[:1])
            wait_until(lambda: all(shard.hexists(HOOKS_HEALTH, "a") for shard in shards), timeout_s=20)
            commit_in_shards(shards, ids[1:])
            wait_until(lambda: is_done(shards), timeout_s=20)
            assert receiver.ids() == ["k0.0"]
            status = json.loads(shiwu("status", "--json"))
            assert (status["endpoints"][0]["state"], status["dead"]) == ("disabled", 60)
            assert len(shiwu("list", "--json", "--limit", "45").splitlines()) == 45
            receiver.behave = lambda _: Answered(204)
            assert sorted(shiwu("retry", "--endpoint", "a").split()) == sorted(f"{each}.0" for each in ids)
            wait_until(lambda: is_done(shards), timeout_s=20)
            assert sorted(receiver.ids()[1:]) == sorted(f"{each}.0" for each in ids)


def fill(shard: ShardRedis, queue: DeliveryQueue, count: int) -> None:
    """Add deliveries that come from entries of the stream of a shard."""
    shard.xgroup_create(RESULT_STREAM, "hooks", id="0", mkstream=True)
    for _ in range(count):
        shard.xadd(RESULT_STREAM, {"id": "k", "answer": "{}"})
    found: Any = shard.xreadgroup("hooks", "me", {RESULT_STREAM: ">"}, count=count)
    entries = found[0][1]
    made = [NewDelivery(endpoint="a", id=f"k{number}.0", payload=Payload(1), body=b"{}") for number in range(count)]
    assert queue.add(made, group="hooks", entry_ids=[entry_id.decode() for entry_id, _ in entries]) == count


def test_failing_endpoint_is_tried_alone_over_all_shards(shards: tuple[ShardRedis, ...]) -> None:
    """Failures in a row count in whichever shards; a success in one ends it in all, and so does a pause begin."""
    queues = open_queues(shards, QueueOptions(alone_after=3, alone_every_s=0.0, max_dead=7))
    for shard, queue in zip(shards, queues, strict=True):
        fill(shard, queue, 5)
    for queue in queues[:3]:
        [taken] = queue.take("a", count=1)
        queue.retry(taken, reason="http_500", delay_s=0.0)
    [taken] = queues[4].take("a", count=5)
    queues[4].delivered(taken)
    assert {state.failures for state in AllDeliveries(queues).health().values()} == {0}
    assert len(queues[5].take("a", count=5)) == 5
    [taken] = queues[3].take("a", count=1)
    queues[3].retry(taken, reason="http_429", delay_s=0.0, pause_s=60.0)
    assert [queue.take("a", count=5) for queue in queues] == [[]] * SHARDS
    assert AllDeliveries(queues).pending(["a", "b"]) == {"a": 5 * SHARDS - 1, "b": 0}


def test_hanging_node_holds_up_no_other_shard(
    cluster: ValkeyCluster, url: str, shards: tuple[ShardRedis, ...], tmp_path: Path
) -> None:
    """Answers of the other shards are delivered meanwhile, and those of its own when it goes on."""
    ids = by_shard([f"k{number}" for number in range(60)], shards=SHARDS, id_of=str)
    hanging = cluster.owner(shards[0].shard.slot or 0)
    away = {n for n in range(SHARDS) if cluster.owner(shards[n].shard.slot or 0) == hanging}
    others = [job_id for shard, group in ids.items() if shard not in away for job_id in group]
    own = [job_id for shard, group in ids.items() if shard in away for job_id in group]
    with WebhookReceiver() as receiver:
        file = write_endpoints(tmp_path, [{"name": "a", "url": receiver.url}])
        with HooksProcess(redis_url=url, file=file) as process:
            process.wait_started()
            wait_until(lambda: all(shard.exists(RESULT_STREAM) for shard in shards), timeout_s=20)
            commit_in_shards(shards, own)
            wait_until(lambda: len(receiver.received) == len(own), timeout_s=20)
            cluster.server(hanging).pause()
            try:
                commit_in_shards(shards, others)
                wait_until(lambda: len(receiver.received) == len(own) + len(others), timeout_s=20)
            finally:
                cluster.server(hanging).resume()
            commit_in_shards(shards, [f"later-{each}" for each in own])
            wait_until(lambda: {f"later-{each}.0" for each in own} <= set(receiver.ids()), timeout_s=40)
            assert process.is_running
