"""Fixtures of several files: a cluster, receivers of webhooks and the process that posts to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu.broker.sharding import PoolOptions, ShardRedis, open_shards
from shiwu.hooks.delivery_queue import DeliveryQueue
from shiwu.hooks.process import queue_options
from tests.support.hooks import HooksProcess, StartHooks, hooks_options, write_endpoints
from tests.support.processes import LOOPBACK
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import WebhookReceiver


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    """A receiver that accepts everything."""
    with WebhookReceiver() as running:
        yield running


@pytest.fixture
def start_hooks(redis_url: str, tmp_path: Path) -> Iterator[StartHooks]:
    """Starts a process with these endpoints, and stops it."""
    started: list[HooksProcess] = []

    def begin(*endpoints: dict[str, Any], urls: dict[str, Any] | None = None, **settings: Any) -> HooksProcess:
        more = {} if urls is None else {"urls": urls}
        file = write_endpoints(tmp_path, endpoints, **more)
        process = HooksProcess(redis_url=redis_url, file=file, **settings)
        started.append(process)
        return process.start().wait_started()

    yield begin
    for process in started:
        process.stop()


@pytest.fixture
def deliveries(redis_client: redis.Redis) -> DeliveryQueue:
    """The queue, for looking at it."""
    return DeliveryQueue(redis_client, queue_options(hooks_options()))


@pytest.fixture(scope="module")
def cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries of one file, whose tests stop no node for good."""
    with ValkeyCluster(folder=tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def cluster(cluster_session: ValkeyCluster) -> ValkeyCluster:
    """The cluster of this file, without keys."""
    cluster_session.flush()
    return cluster_session


@pytest.fixture
def shards(url: str) -> Iterator[tuple[ShardRedis, ...]]:
    """A client of each shard of the cluster that the file names by its fixture `url`."""
    clients = open_shards(url, PoolOptions(timeout_s=5))
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica."""
    with RedisServer(folder=tmp_path / "primary", binary=valkey_binary()) as primary:
        config = {"replicaof": f"{LOOPBACK} {primary.port}"}
        with RedisServer(folder=tmp_path / "replica", binary=valkey_binary(), config=config) as replica:
            with replica.client() as client:
                wait_until(lambda: client.info("replication")["master_link_status"] == "up", timeout_s=20)
            yield primary, replica
