"""A stock Celery application in one shard of a real cluster: the tests of canvas, revokes, priorities, moving slots."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from shiwu.broker.sharding import PoolOptions, ShardRedis, cluster_shard, open_shards
from shiwu.celery import options
from shiwu.contract import Lane
from tests.support import pictures
from tests.support.canvas import CANVASES, GET_S, Plain, check_revoke_of_a_waiting_task, check_task_events, plain_worker
from tests.support.celery_client import celery_client
from tests.support.plain_app import NOTES
from tests.support.processes import ROOT, clean_environment
from tests.support.servers import WorkerProcess
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.xdist_group(__name__),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Celery's own use of redis
]
SHARDS: Final = 3
SHARD: Final = 2
"""That of the application; shiwu's workers answer commands and send events in shard 0."""
SLOT: Final = cluster_shard(SHARD).slot or 0


@dataclass(frozen=True)
class Shard:
    """The shard of the application, as the tests of one server use a server."""

    cluster: ValkeyCluster

    @property
    def url(self) -> str:
        """Where clients of shiwu ask."""
        return self.cluster.url(shards=SHARDS)

    def client(self) -> ShardRedis:
        """A client that names keys as on one server."""
        clients = open_shards(self.url, PoolOptions(timeout_s=10))
        for other in clients[:SHARD]:
            other.close()
        return clients[SHARD]


@pytest.fixture(scope="module")
def servers(cluster_session: ValkeyCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shard, Path]]:
    """A cluster, a worker of shiwu on its shards, and an ordinary Celery worker in one of them."""
    folder = tmp_path_factory.mktemp("celery-shards")
    for number, name in enumerate(("good", "other")):
        (folder / f"{name}.png").write_bytes(pictures.png(pictures.picture().resize((40 + number, 40))))
    shard = Shard(cluster_session)
    environment = {"PLAIN_REDIS_URL": shard.url, "PLAIN_SHARD": str(SHARD)}
    with (
        WorkerProcess(
            redis_url=shard.url,
            folder=folder,
            by_celery=True,
            allow_folders=folder,
            callback_tasks="shiwu.tag,plain.*",
            celery_args="-E -n shards@here",
        ) as worker,
        plain_worker("tests.support.shard_app", folder=folder, env=environment) as plain,
    ):
        worker.wait_ready(timeout_s=180)
        wait_until(lambda: "ready." in plain.log_text() or not plain.is_running, timeout_s=60)
        yield shard, folder


@pytest.fixture
def app(servers: tuple[Shard, Path]) -> Iterator[Celery]:
    """A user's application in the shard."""
    with celery_client(config=options(servers[0].url, shard=SHARD)) as application:
        yield application


@pytest.fixture
def watching_app(servers: tuple[Shard, Path]) -> Iterator[Celery]:
    """An operator's application, in the shard in which workers answer commands and send events."""
    with celery_client(config=options(servers[0].url)) as application:
        yield application


@pytest.fixture
def plain(servers: tuple[Shard, Path], app: Celery) -> Iterator[Plain]:
    """The application with `shiwu.tag`; what an ordinary task does is shown on one server."""
    shard, folder = servers
    with shard.client() as client:
        client.delete(NOTES)
        good, other, missing = ((folder / f"{name}.png").as_uri() for name in ("good", "other", "missing"))
        yield Plain(app, client, "shiwu.tag", good, other, missing, shard.url)


@pytest.mark.parametrize("name", CANVASES)
def test_canvas_in_a_shard(plain: Plain, name: str) -> None:
    """As on one server."""
    CANVASES[name](plain)


def test_revoke_is_heard_from_any_shard(plain: Plain) -> None:
    """And holds there."""
    check_revoke_of_a_waiting_task(plain)


def test_events_of_all_shards_are_in_the_first(plain: Plain, watching_app: Celery) -> None:
    """Those of jobs in the shard of the application too."""
    check_task_events(plain, watching_app)


def test_countdown_expiry_and_priority(plain: Plain) -> None:
    """The highest priority has a list of its own, as kombu writes it."""
    late = plain.tag(plain.good).apply_async(countdown=1)
    old = plain.tag(plain.good).apply_async(countdown=1, expires=0.5)
    first = plain.tag(plain.good).apply_async(priority=9)
    assert first.get(timeout=GET_S)["lane"] == Lane.BULK
    assert late.get(timeout=GET_S)["status"] == "tagged"
    with pytest.raises(TaskRevokedError):
        old.get(timeout=GET_S)


def test_workers_answer_inspect_in_the_first_shard(watching_app: Celery) -> None:
    """Also `shiwu-worker`'s own application, by which operators revoke."""
    found: Any = wait_until(watching_app.control.inspect(timeout=2.0).ping, timeout_s=GET_S, what="a reply to ping")
    assert found == {"shards@here": {"ok": "pong"}}


def test_example_of_an_application_in_a_shard(servers: tuple[Shard, Path]) -> None:
    """docs/examples/celery_shard.py, as its users run it."""
    shard, folder = servers
    command = [sys.executable, str(ROOT / "docs/examples/celery_shard.py"), (folder / "good.png").as_uri()]
    env = clean_environment({"SHOP_REDIS_URL": shard.url, "SHOP_SHARD": "1"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3


def test_application_without_our_code_needs_a_prefix(servers: tuple[Shard, Path]) -> None:
    """The address of the node and `global_keyprefix`: it sends, waits and gets until the slot moves."""
    shard, folder = servers
    prefix = {"global_keyprefix": cluster_shard(SHARD).prefix}
    config = {"broker_transport_options": prefix, "result_backend_transport_options": prefix}
    url = f"redis://127.0.0.1:{shard.cluster.owner(SLOT)}/0"
    with celery_client(url, config=config) as app:
        call = app.signature("shiwu.tag", args=[(folder / "good.png").as_uri()], queue=Lane.BULK.queue, app=app)
        follower = app.signature("plain.best", app=app)
        assert (call | follower).apply_async().get(timeout=GET_S).startswith("tagged file://")


def test_nothing_is_lost_while_the_slot_moves(servers: tuple[Shard, Path], plain: Plain) -> None:
    """Neither a job nor a link, of those that an application sends before, meanwhile and afterwards."""
    cluster = servers[0].cluster
    with ThreadPoolExecutor(1) as pool:
        sent = [plain.tag(plain.good).apply_async() for _ in range(10)]
        moved = pool.submit(cluster.move_atomically, SLOT, to=cluster.other_than(cluster.owner(SLOT)))
        while not moved.done():
            sent.append(plain.tag(plain.good).apply_async())
        moved.result()
    sent += [plain.tag(plain.other).apply_async(link=plain.then("note", "moved")) for _ in range(10)]
    assert {result.get(timeout=GET_S)["status"] for result in sent} == {"tagged"}
    with servers[0].client() as client:
        wait_until(lambda: client.llen(NOTES) == 10, timeout_s=20, what="each link within the time of a poll")


@pytest.mark.long
def test_application_goes_on_after_a_failover(tmp_path: Path) -> None:
    """The node of its shard is killed: the next `get` ends when a replica has taken over."""
    (tmp_path / "good.png").write_bytes(pictures.png(pictures.picture()))
    with ExitStack() as stack:
        cluster = stack.enter_context(ValkeyCluster(folder=tmp_path / "cluster", replicas=3))
        worker = WorkerProcess(
            redis_url=cluster.url(shards=SHARDS), folder=tmp_path, allow_folders=tmp_path, name="failover"
        )
        stack.enter_context(worker).wait_ready(timeout_s=180)
        app = stack.enter_context(celery_client(config=options(cluster.url(shards=SHARDS), shard=SHARD)))
        app.conf.task_publish_retry_policy = {"max_retries": 40, "interval_step": 0.2, "interval_max": 0.5}
        call = app.signature("shiwu.tag", args=[(tmp_path / "good.png").as_uri()], queue=Lane.BULK.queue, app=app)
        assert call.apply_async().get(timeout=GET_S)["status"] == "tagged"
        waiting = call.clone().set(countdown=2).apply_async()
        cluster.ask(cluster.owner(SLOT), "WAIT", 1, 5000)
        cluster.server(cluster.owner(SLOT)).kill()
        assert waiting.get(timeout=60)["status"] == "tagged"
        assert call.apply_async().get(timeout=60)["status"] == "tagged"
