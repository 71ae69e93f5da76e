"""Workers and loaders that are stopped, killed or paused under load: every id is answered, and once."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import redis

from shiwu.contract import CLAIMS
from tests.conftest import StartWorker
from tests.support import drill, pictures
from tests.support.servers import PictureServer, Valkey
from tests.support.waiting import wait_until

LEASE_S = 3


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A few small pictures in a folder that workers may read."""
    found = []
    for sample in pictures.samples()[:6]:
        path = tmp_path / f"{sample.path.stem}.png"
        path.write_bytes(pictures.png(pictures.picture(sample.label).resize((64, 64))))
        found.append(path.as_uri())
    return found


def children(pid: int) -> list[int]:
    """Process ids of the loaders of a worker."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children_of_thread in lists for child in children_of_thread]


def loaders_of(pid: int) -> list[int]:
    """Process ids of a worker's loaders: the children of its children."""
    return [loader for nursery in children(pid) for loader in children(nursery)]


def test_sigterm_under_load_finishes_or_gives_back(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, images: list[str], tmp_path: Path
) -> None:
    """SIGTERM in the middle: exit 0 within the grace time, nothing claimed, a second worker answers the rest."""
    ids = drill.enqueue(redis_client, images, count=600, prefix="term", random_from=random.Random(1))
    worker = start_worker(redis_url=redis_url, allow_folders=tmp_path, grace_s=5)
    wait_until(lambda: drill.answered(redis_client) > 50, timeout_s=30)
    worker.terminate()
    assert worker.wait(timeout_s=12) == 0
    assert redis_client.hlen(CLAIMS) == 0
    assert not worker.ready_file.exists()
    start_worker(redis_url=redis_url, allow_folders=tmp_path)
    drill.wait_answered(redis_client, ids, timeout_s=60)
    result = drill.count(redis_client, ids)
    assert (result.lost, result.twice, result.reaped) == (0, 0, 0)


def test_a_second_sigterm_gives_back_at_once(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, http_server: PictureServer
) -> None:
    """Jobs that hang in a slow fetch are given back to the front of their lane without waiting for the grace time."""
    from tests.support.picture_server import Reply  # noqa: PLC0415 beside its one use

    slow = http_server.serve("/slow.png", Reply.picture(pictures.png(pictures.picture())).late(first_pause_s=8))
    drill.enqueue(redis_client, [slow], count=4, prefix="hurry", random_from=random.Random(2))
    worker = start_worker(redis_url=redis_url, grace_s=60)
    wait_until(lambda: redis_client.hlen(CLAIMS) == 4, timeout_s=20)
    worker.terminate()
    wait_until(lambda: "stopping" in worker.log_text(), timeout_s=5)
    worker.terminate()
    assert worker.wait(timeout_s=10) == 0
    assert redis_client.hlen(CLAIMS) == 0
    assert sum(redis_client.llen(lane) for lane in ("shiwu.interactive", "shiwu.bulk")) == 4


@pytest.mark.slow
def test_sigkill_loses_nothing_and_answers_nothing_twice(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, images: list[str], tmp_path: Path
) -> None:
    """A worker dies with hundreds of jobs claimed; a living one has them within one lease and two seconds."""
    chance = random.Random(3)
    options = {"allow_folders": tmp_path, "lease_s": LEASE_S, "slots": 512, "log_level": "warning"}
    ids: list[str] = []
    start_worker(redis_url=redis_url, **options)
    ids += drill.enqueue(redis_client, images, count=300, prefix="first", random_from=chance)
    [survivor] = wait_until(lambda: drill.tokens(redis_client), timeout_s=20, every_s=0.0)
    drill.wait_answered(redis_client, ids, timeout_s=60)
    for number in range(2):
        victim = start_worker(redis_url=redis_url, **options)
        seen = drill.answered(redis_client)
        ids += drill.enqueue(redis_client, images, count=1500, prefix=f"kill{number}", random_from=chance)
        wait_until(lambda seen=seen: drill.answered(redis_client) > seen + chance.randrange(20, 300), timeout_s=30)
        victim.kill()
        assert drill.tokens(redis_client) - {survivor}
        wait_until(lambda: not drill.tokens(redis_client) - {survivor}, timeout_s=LEASE_S + 2)
        drill.wait_answered(redis_client, ids, timeout_s=90)
    result = drill.count(redis_client, ids)
    assert (result.lost, result.twice) == (0, 0)
    assert result.reaped > 0


def test_a_killed_loader_is_replaced_and_its_jobs_are_answered(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, images: list[str], tmp_path: Path
) -> None:
    """SIGKILL of loaders under load costs no job its answer, and the worker itself goes on."""
    worker = start_worker(redis_url=redis_url, allow_folders=tmp_path, loaders=2, loader_spares=1)
    ids = drill.enqueue(redis_client, images, count=800, prefix="loader", random_from=random.Random(4))
    for threshold in (50, 250, 450):
        wait_until(lambda threshold=threshold: drill.answered(redis_client) > threshold, timeout_s=60)
        os.kill(loaders_of(worker.pid)[0], signal.SIGKILL)
    drill.wait_answered(redis_client, ids, timeout_s=60)
    result = drill.count(redis_client, ids)
    assert (result.lost, result.twice, result.reaped) == (0, 0, 0)
    assert "loader_replaced" in worker.log_text()
    assert '"event": "failed"' not in worker.log_text()


def test_loaders_end_with_their_worker(start_worker: StartWorker, redis_url: str) -> None:
    """A SIGKILL of the worker leaves no orphans."""
    worker = start_worker(redis_url=redis_url, loaders=2, loader_spares=1)
    loaders = [*children(worker.pid), *loaders_of(worker.pid)]
    assert len(loaders) == 4, "the nursery and three loaders"
    worker.kill()
    wait_until(lambda: not any(_lives(pid) for pid in loaders), timeout_s=5)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_redis_restarts_in_the_middle(
    start_worker: StartWorker, valkey: Valkey, images: list[str], tmp_path: Path
) -> None:
    """A Redis that is killed and comes back (with its AOF) costs no answer and doubles none."""
    with valkey.client() as client:
        ids = drill.enqueue(client, images, count=600, prefix="redis", random_from=random.Random(5))
    worker = start_worker(redis_url=valkey.url, allow_folders=tmp_path, lease_s=LEASE_S)
    with valkey.client() as client:
        wait_until(lambda: drill.answered(client) > 60, timeout_s=60)
    valkey.kill()
    valkey.restart()
    with valkey.client() as client:
        drill.wait_answered(client, ids, timeout_s=60)
        result = drill.count(client, ids)
    assert (result.lost, result.twice) == (0, 0)
    assert worker.is_running


def test_a_model_that_does_not_load_ends_the_worker(start_worker: StartWorker, redis_url: str, tmp_path: Path) -> None:
    """Never ready, and an exit code with a name."""
    (tmp_path / "model").mkdir()
    worker = start_worker(redis_url=redis_url, ready=False, model=tmp_path / "model")
    assert worker.wait(timeout_s=60) == 65
    assert not worker.ready_file.exists()
    assert '"reason": "MODEL"' in worker.log_text()
