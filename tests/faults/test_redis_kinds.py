"""Redis itself beside Valkey, and a Redis that keeps nothing: what is promised there, with real processes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shiwu.contract import CLAIMS
from tests.conftest import StartWorker
from tests.support import drill, pictures
from tests.support.redis_server import RedisServer, redis_binary, valkey_binary
from tests.support.waiting import wait_until

LEASE_S = 2
FEW = {"lease_s": LEASE_S, "max_batch": 8, "loaders": 1, "loader_spares": 1, "torch_threads": 1, "redis_timeout_s": 2}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A few small pictures in a folder that workers may read."""
    found = []
    for sample in pictures.samples()[:4]:
        path = tmp_path / f"{sample.path.stem}.png"
        path.write_bytes(pictures.png(pictures.picture(sample.label).resize((64, 64))))
        found.append(path.as_uri())
    return found


@pytest.mark.slow
def test_sigkill_on_redis_itself(start_worker: StartWorker, images: list[str], tmp_path: Path) -> None:
    """What Valkey is used for elsewhere: a worker dies with jobs claimed, another has them within a lease and 2 s."""
    with RedisServer(folder=tmp_path / "redis", binary=redis_binary()) as server, server.client() as client:
        options = FEW | {"redis_url": server.url, "allow_folders": tmp_path}
        victim, successor = start_worker(ready=False, **options), start_worker(ready=False, **options)
        for worker in (victim, successor):
            worker.wait_ready()
        ids = drill.enqueue(client, images, count=600, prefix="kill", random_from=random.Random(6))
        wait_until(lambda: drill.answered(client) > 60, timeout_s=30)

        def held() -> bool:
            return any(token.startswith(f"{victim.name}.".encode()) for token in drill.tokens(client))

        wait_until(held, timeout_s=10, every_s=0.0)
        victim.kill()
        wait_until(lambda: not held(), timeout_s=LEASE_S + 2)
        drill.wait_answered(client, ids, timeout_s=60)
        wait_until(lambda: not client.exists(CLAIMS), timeout_s=10)
        result = drill.count(client, ids)
    assert (result.answered, result.lost, result.twice) == (600, 0, 0)
    assert result.statuses == {"tagged": 600}
    # A successor that gets no core for a lease has its own jobs taken back too, and answers them nevertheless.
    assert result.reaped >= result.attempts[2] > 0


def test_a_restart_without_aof(start_worker: StartWorker, images: list[str], tmp_path: Path) -> None:
    """All that Redis knew is gone, as it was configured: the worker lives on, and what is enqueued now is answered."""
    with RedisServer(folder=tmp_path / "server", binary=valkey_binary()) as server:
        worker = start_worker(redis_url=server.url, allow_folders=tmp_path, **FEW)
        with server.client() as client:
            drill.enqueue(client, images, count=300, prefix="old", random_from=random.Random(7))
            wait_until(lambda: drill.answered(client) > 40, timeout_s=30)
        server.kill()
        server.start()
        with server.client() as client:
            ids = drill.enqueue(client, images, count=60, prefix="new", random_from=random.Random(8))
            drill.wait_answered(client, ids, timeout_s=30)
            wait_until(lambda: not client.exists(CLAIMS), timeout_s=10)
            result = drill.count(client, ids)
        assert (result.answered, result.twice, result.attempts) == (60, 0, {1: 60})
        assert result.statuses == {"tagged": 60}
        assert worker.is_running
