"""In random histories of workers that crash, no id is lost and each is answered once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from shiwu import Client
from shiwu.broker.sharding import PoolOptions, open_shards
from tests.support.fleet import Fleet, ShardFleet
from tests.support.valkey_cluster import ValkeyCluster

SHARDS = 3


@pytest.mark.slow
def test_random_histories_answer_every_id_once(redis_url: str) -> None:
    """Random histories of two workers neither lose a job nor answer one twice."""
    with redis.Redis.from_url(redis_url) as client:
        Fleet.clients = [client]
        run_state_machine_as_test(Fleet, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))


@pytest.fixture(scope="module")
def shard_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[ShardFleet]]:
    """The machine of three shards on nodes that keep what they have acknowledged."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    with ExitStack() as stack:
        cluster = stack.enter_context(ValkeyCluster(folder=tmp_path_factory.mktemp("cluster"), config=config))
        url = cluster.url(shards=SHARDS)
        clients = open_shards(url, PoolOptions(timeout_s=5))
        for client in clients:
            stack.enter_context(client)
        ShardFleet.cluster, ShardFleet.clients = cluster, clients
        ShardFleet.client = stack.enter_context(Client(url, timeout_s=5))
        yield ShardFleet


def run_fleet(fleet: type[ShardFleet], *, examples: int, steps: int) -> None:
    """Run histories. A failing one is not made shorter, because each start of a node takes two seconds."""
    phases = (Phase.reuse, Phase.generate)
    options = settings(max_examples=examples, stateful_step_count=steps, deadline=None, phases=phases)
    run_state_machine_as_test(fleet, settings=options)


def test_histories_over_shards_and_a_crash_answer_once(shard_fleet: type[ShardFleet]) -> None:
    """Each id is in one shard, and a crash of its node loses nothing that was acknowledged."""
    run_fleet(shard_fleet, examples=3, steps=40)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_histories_over_shards_answer_once(shard_fleet: type[ShardFleet]) -> None:
    """The same for more histories."""
    run_fleet(shard_fleet, examples=40, steps=60)
