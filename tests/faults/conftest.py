"""Two workers that many tests share, because a start takes seconds: one that stays, one that is there to be killed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis

from shiwu.contract import CLAIMS, Lane
from tests.conftest import FAILED
from tests.support import drill, pictures
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import PictureServer, Valkey, WorkerProcess
from tests.support.waiting import wait_until

LEASE_S = 2
BATCH = 8
BULK_SHARE = 0.2


@dataclass(frozen=True)
class Fleet:
    """One server and its workers. Who is not asked for rests: it is stopped like a process in a debugger."""

    client: redis.Redis
    url: str
    proxy: FaultProxy
    near: WorkerProcess
    far: WorkerProcess
    images: list[str]

    def wake(self, worker: WorkerProcess) -> WorkerProcess:
        """Start a worker, or let it go on."""
        if worker.is_running:
            worker.resume()
            return worker
        return worker.start().wait_ready()

    def rest(self, worker: WorkerProcess) -> None:
        """Stop a worker that holds nothing; it neither claims nor renews."""
        if worker.is_running:
            worker.pause()

    def blocked(self, command: str) -> list[str]:
        """The names of the connections that wait in this command."""
        return [one["name"] for one in self.client.client_list() if one["cmd"] == command and "b" in one["flags"]]

    def is_idle(self, worker: WorkerProcess) -> bool:
        """Whether a worker has asked for messages, and waits to be notified of the next."""
        tracking = [one for one in self.client.client_list() if one["cmd"] == "exists" and "t" in one["flags"]]
        return f"shiwu-{worker.name}" in [one["name"] for one in tracking]

    def wait_settled(self, worker: WorkerProcess) -> None:
        """Wait until a worker is idle and Celery's own part of it, which starts last, listens."""
        wait_until(lambda: self.blocked("brpop"), timeout_s=20, what="Celery listens")
        wait_until(lambda: self.is_idle(worker), timeout_s=10, what="an idle worker asks")

    def send(
        self, count: int, *, prefix: str, images: list[str] | None = None, lanes: tuple[Lane, ...] = tuple(Lane)
    ) -> list[str]:
        """Enqueue so many pictures, in an order that is the same each time."""
        chance = random.Random(prefix)
        return drill.enqueue(
            self.client, images or self.images, count=count, prefix=prefix, random_from=chance, lanes=lanes
        )

    def counted(self, ids: list[str], *, timeout_s: float = 60.0) -> drill.Count:
        """Wait for these answers, and count; nothing may be lost or come twice."""
        drill.wait_answered(self.client, ids, timeout_s=timeout_s)
        wait_until(lambda: not self.client.exists(CLAIMS), timeout_s=LEASE_S + 5)
        result = drill.count(self.client, ids)
        assert (result.enqueued, result.answered, result.lost, result.twice) == (len(ids), len(ids), 0, 0)
        return result


@pytest.fixture(scope="session")
def _fleet(picture_server: PictureServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    images = []
    for sample in pictures.samples()[:6]:
        path = folder / f"{sample.path.stem}.png"
        path.write_bytes(pictures.png(pictures.picture(sample.label).resize((64, 64))))
        images.append(path.as_uri())
    options = {
        "lease_s": LEASE_S,
        "max_batch": BATCH,
        "bulk_share": BULK_SHARE,
        "loaders": 1,
        "loader_spares": 1,
        "torch_threads": 1,
        "grace_s": 15,
        "retry_first_s": 0.2,
        "redis_timeout_s": 2,
        "allow_folders": folder,
        "allow_hosts": picture_server.host,
    }

    def worker(name: str, url: str) -> WorkerProcess:
        return WorkerProcess(redis_url=url, folder=folder, name=name, **options)

    with Valkey(folder=folder / "valkey") as server, server.client() as client, FaultProxy(server.url) as proxy:
        fleet = Fleet(client, server.url, proxy, worker("near", server.url), worker("far", proxy.url), images)
        yield fleet
        for one in (fleet.near, fleet.far):
            one.stop()


@pytest.fixture
def fleet(_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The workers with an empty server and no faults."""
    yield _fleet
    _fleet.proxy.heal()
    if request.node.stash.get(FAILED, False):
        # What it did not finish must not disturb the next one.
        for worker in (_fleet.near, _fleet.far):
            worker.stop(timeout_s=0)
            print(f"--- {worker.name}, exit code {worker.exit_code} ---\n{worker.log_tail(lines=60)}")  # noqa: T201 pytest shows it beside the failure


def _alone(fleet: Fleet, worker: WorkerProcess) -> WorkerProcess:
    for other in (fleet.near, fleet.far):
        if other is not worker:
            fleet.rest(other)
    # What was given back to a lane must not be taken up again.
    fleet.client.flushall()
    fleet.wake(worker)
    wait_until(lambda: not fleet.client.exists(CLAIMS), timeout_s=20, what="no work of the test before")
    fleet.client.flushall()
    return worker


@pytest.fixture
def near(fleet: Fleet) -> WorkerProcess:
    """The worker that stays, alone and idle."""
    return _alone(fleet, fleet.near)


@pytest.fixture
def far(fleet: Fleet) -> WorkerProcess:
    """The worker behind the proxy, alone and idle. Do with it what you like; who needs it next starts another."""
    return _alone(fleet, fleet.far)
