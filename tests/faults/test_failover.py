"""Real sentinels, a primary whose replicas lag or that hangs: what was confirmed stays, what was not is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from redis import RedisError

from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.broker.redis_errors import NotReplicated
from shiwu.contract import RESULT_STREAM
from tests.conftest import StartWorker
from tests.support import drill, pictures
from tests.support.failover import Failover
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

CHUNK_SIZE = 30
FOLLOWS_S = 30.0
"""Sentinels agree, a replica becomes primary, the other one follows it, and only then a write is confirmed."""


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Failover]:
    """A primary, two replicas, three sentinels."""
    with Failover(folder=tmp_path / "servers", replicas=2) as running:
        yield running


def told(worker: WorkerProcess) -> set[str]:
    """Ids of the answers that a worker believes to be written and confirmed."""
    lines = [line for line in worker.log_text().splitlines() if '"event": "tagged"' in line]
    return {json.loads(line)["id"] for line in lines}


def counted(client: redis.Redis) -> list[str]:
    """The ids in the results stream, in order of the alphabet."""
    entries: Any = client.xrange(RESULT_STREAM)
    return sorted(fields[b"id"].decode() for _, fields in entries)


def send(producer: Client, image: str, name: str) -> list[str]:
    """A portion of jobs that one replica must confirm; their ids, of which some may not have been confirmed."""
    asked = [{"image": image, "id": f"{name}-{number}"} for number in range(CHUNK_SIZE)]
    list(producer.enqueue_many(asked, replicas=1))
    return [one["id"] for one in asked]


def sent_at_last(producer: Client, image: str, name: str) -> list[str]:
    """Enqueues the same ids again and again until a replica has confirmed them."""

    def confirmed() -> list[str]:
        try:
            return send(producer, image, name)
        except RedisError:
            return []

    return wait_until(confirmed, timeout_s=FOLLOWS_S, every_s=0.2)


@pytest.mark.slow
def test_what_was_confirmed_survives_lag_and_hang(servers: Failover, start_worker: StartWorker, tmp_path: Path) -> None:
    """Acknowledged writes vanish with a primary; jobs and answers that a replica had confirmed do not."""
    (tmp_path / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    image = (tmp_path / "x.png").as_uri()
    options = {"lease_s": 3, "max_batch": 8, "redis_timeout_s": 2, "torch_threads": 1, "loaders": 1}
    worker = start_worker(redis_url=servers.url, allow_folders=tmp_path, commit_replicas=1, **options)
    with Client(servers.url, timeout_s=2) as producer, connect(servers.url, timeout_s=2) as client:
        ids = lag(servers, producer, client, worker, image)
        ids += hang(servers, producer, client, image)
        drill.wait_answered(client, ids, timeout_s=FOLLOWS_S)
        result = drill.count(client, ids)
        assert (result.lost, result.twice, result.statuses) == (0, 0, {"tagged": len(ids)})
        assert worker.is_running
        wait_until(lambda: told(worker) == set(ids), timeout_s=10)


def lag(servers: Failover, producer: Client, client: redis.Redis, worker: WorkerProcess, image: str) -> list[str]:
    """A primary dies with what its replicas do not know; what they had confirmed is there after it. All ids sent."""
    first = send(producer, image, "first")
    drill.wait_answered(client, first, timeout_s=30)
    wait_until(lambda: told(worker) == set(first), timeout_s=10)
    second = send(producer, image, "second")
    servers.isolate_replicas()
    with pytest.raises(NotReplicated):
        send(producer, image, "third")
    client.set("written", "on the primary only")
    confirmed = told(worker)
    old = servers.kill_primary()
    servers.resume_servers()
    servers.wait_failover(old)
    wait_until(lambda: is_primary_without(client, "written"), timeout_s=FOLLOWS_S, what="a real loss")
    assert confirmed <= set(counted(client)), "confirmed answers were lost"
    wait_until(lambda: set(second) <= set(counted(client)), timeout_s=FOLLOWS_S, what="the confirmed jobs")
    servers.bring_back(old)
    # Of the third portion nothing was promised: its producer was told, and sends it again.
    return first + second + sent_at_last(producer, image, "third")


def answered_now(client: redis.Redis) -> int:
    """How many jobs are answered; 0 while a server that changes its role resets connections."""
    with suppress(redis.ConnectionError):
        return drill.answered(client)
    return 0


def hang(servers: Failover, producer: Client, client: redis.Redis, image: str) -> list[str]:
    """A primary hangs with open connections. What it takes when it wakes is not confirmed, and written again."""
    before, ids = drill.answered(client), send(producer, image, "before")
    wait_until(lambda: answered_now(client) > before + 5, timeout_s=30, every_s=0.002)
    old = servers.pause_primary()
    servers.wait_failover(old)
    servers.bring_back(old)
    return ids + sent_at_last(producer, image, "after")


def is_primary_without(client: redis.Redis, key: str) -> bool:
    """Whether the new primary answers, and has never had a key that the old one had acknowledged."""
    try:
        return not client.exists(key)
    except RedisError:
        return False
