"""The real launcher with two CPU devices: workers that are killed or keep crashing, and a launcher that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from shiwu.contract import CLAIMS, RESULT_STREAM, Answer
from shiwu_worker.errors import ExitCode
from tests.conftest import StartWorker
from tests.faults.conftest import Fleet
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.family import children, family, lives
from tests.support.picture_server import PictureServer, Reply
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

TWO = "--gpus cpu:0,cpu:1"
ONE = "--gpus cpu:0"
"""A worker without a launcher, which starts as a fork; those of a launcher import their libraries."""
PLACES = ["cpu0", "cpu1"]
SLOW = Reply.picture(pictures.png(pictures.picture().resize((64, 64))), content_type="image/png").late(first_pause_s=30)


@pytest.fixture
def ours(_fleet: Fleet, tmp_path: Path) -> Iterator[Fleet]:
    """The pictures of the fleet on a server that none of its workers sees."""
    with Valkey(folder=tmp_path / "valkey") as server, server.client() as client:
        yield Fleet(client, server.url, _fleet.proxy, _fleet.near, _fleet.far, _fleet.images)


@pytest.fixture
def launch(ours: Fleet, start_worker: StartWorker) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts the launcher; no process of its family is left afterwards."""
    seen: list[WorkerProcess] = []

    def start(*, args: str = TWO, ready: bool = True, **options: object) -> WorkerProcess:
        folder = Path(ours.images[0].removeprefix("file://")).parent
        limits = {"lease_s": 2, "max_batch": 4, "loaders": 1, "loader_spares": 0, "torch_threads": 1, "grace_s": 15}
        worker = start_worker(
            redis_url=ours.url, ready=ready, args=args, **{**limits, "allow_folders": folder, "name": "box", **options}
        )
        seen.append(worker)
        return worker

    yield start
    for worker in seen:
        all_of_it = family(worker.pid)
        worker.stop()
        wait_until(lambda pids=all_of_it: not any(map(lives, pids)), timeout_s=30, what="nothing left")


def events(worker: WorkerProcess, name: str) -> list[dict[str, object]]:
    """The log lines of this event."""
    return [line for line in log_lines(worker) if line["event"] == name]


def log_lines(worker: WorkerProcess) -> list[dict[str, object]]:
    """All log lines; what Celery says for itself at a signal is no log."""
    lines = [line for line in worker.log_text().splitlines() if line and not line.startswith("worker: ")]
    return [json.loads(line) for line in lines]


def environment(pid: int) -> dict[str, str]:
    """What a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def answerers(client: redis.Redis) -> set[str]:
    """The workers that answered something."""
    entries = client.xrange(RESULT_STREAM)
    return {str(Answer.from_json(fields[b"answer"]).worker) for _, fields in entries}  # type: ignore[union-attr]  # redis-py's sync or async


@pytest.mark.long
def test_each_card_has_its_worker(launch: Callable[..., WorkerProcess], ours: Fleet) -> None:
    """Both answer, under their names and on their CPUs; all log lines are JSON; SIGTERM ends everything with 0."""
    box = launch(args=f"{TWO} -E", env={"SHIWU_HTTP_PORT": "0"})
    workers = children(box.pid)
    assert len(workers) == 2
    nodes = [f"shiwu@{socket.gethostname()}-{name}" for name in PLACES]
    told = [environment(pid) for pid in workers]
    assert [one["SHIWU_WORKER_NAME"] for one in told] == ["box-cpu0", "box-cpu1"]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {""}
    shares = [os.sched_getaffinity(pid) for pid in workers]
    assert set().union(*shares) == os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) < 2 or not shares[0] & shares[1]
    with celery_client(ours.url) as app, app.connection_for_read() as connection:
        found: set[str] = set()
        receiver = app.events.Receiver(
            connection, handlers={"task-succeeded": lambda event: found.add(event["hostname"])}
        )
        capture = receiver.itercapture(limit=None, timeout=20, wakeup=False)
        next(capture)
        ids = ours.send(200, prefix="both")
        while found != set(nodes):
            next(capture)
    ours.counted(ids)
    assert answerers(ours.client) == {"box-cpu0", "box-cpu1"}
    box.terminate()
    assert box.wait(timeout_s=30) == 0
    assert not any(map(lives, workers))
    assert not box.ready_file.exists()
    assert [line["node"] for line in events(box, "worker_started")] == nodes
    assert len(events(box, "tagged")) == len(ids)
    assert len(events(box, "stopped")) == 2


def test_killed_worker_is_replaced_and_sigterm_drains_both(launch: Callable[..., WorkerProcess], ours: Fleet) -> None:
    """One start for both, because each worker of a launcher imports its libraries."""
    box = launch()
    check_killed_worker_is_replaced(box, ours)
    check_sigterm_under_load_drains_both(launch, box, ours)


def check_killed_worker_is_replaced(box: WorkerProcess, ours: Fleet) -> None:
    """Under load: the other goes on, what it held comes back by its lease, all is answered once."""
    ids = ours.send(300, prefix="killed")
    wait_until(lambda: len(answerers(ours.client)) == 2, timeout_s=30)
    first, second = children(box.pid)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: events(box, "worker_crashed"), timeout_s=5, what="the launcher notices")
    wait_until(lambda: not box.ready_file.exists(), timeout_s=5, what="not ready without it")
    more = ours.send(100, prefix="meanwhile")
    box.wait_ready()
    ours.counted([*ids, *more])
    assert second in children(box.pid)
    assert [line["reason"] for line in events(box, "worker_crashed")] == ["SIGKILL"]
    again = ours.send(200, prefix="again")
    ours.counted(again)
    assert len(events(box, "ready")) == 3


def check_sigterm_under_load_drains_both(launch: Callable[..., WorkerProcess], box: WorkerProcess, ours: Fleet) -> None:
    """Exit 0, and nothing stays claimed."""
    ours.client.flushall()
    ids = ours.send(400, prefix="drain")
    wait_until(lambda: len(answerers(ours.client)) == 2, timeout_s=30)
    box.terminate()
    assert box.wait(timeout_s=30) == 0
    assert not ours.client.exists(CLAIMS)
    launch(args=ONE, name="next")
    result = ours.counted(ids)
    assert (result.reaped, result.attempts) == (0, {1: 400})


@pytest.mark.long
def test_a_second_signal_gives_back_at_once(
    launch: Callable[..., WorkerProcess], ours: Fleet, http_server: PictureServer
) -> None:
    """As it does to a worker alone."""
    box = launch()
    ours.send(6, prefix="hurry", images=[http_server.serve("/slow.png", SLOW)])
    wait_until(lambda: ours.client.hlen(CLAIMS) == 6, timeout_s=20)
    box.signal(signal.SIGINT)
    wait_until(lambda: len(events(box, "stopping")) == 2, timeout_s=5)
    box.signal(signal.SIGINT)
    assert box.wait(timeout_s=12) == 0, "the grace time is 15 s"
    assert not ours.client.exists(CLAIMS)


@pytest.mark.long
def test_worker_that_keeps_crashing_is_retired(launch: Callable[..., WorkerProcess]) -> None:
    """After growing pauses; the other goes on and drains, and the machine is not ready meanwhile."""
    box = launch(ready=False)

    def is_retired() -> bool:
        for pid in children(box.pid):
            if environment_of_place(pid) == "box-cpu0":
                os.kill(pid, signal.SIGKILL)
        return bool(events(box, "worker_retired"))

    wait_until(is_retired, timeout_s=90, every_s=0.1, what="the launcher retires the worker")
    assert [line["restart_in_s"] for line in events(box, "worker_crashed")] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert [(line["worker"], line["workers_left"]) for line in events(box, "worker_retired")] == [("cpu0", 1)]
    assert box.is_running
    assert not box.ready_file.exists()
    box.terminate()
    assert box.wait(timeout_s=40) == ExitCode.OK
    assert len(events(box, "ready")) == len(events(box, "stopped")) == 1


def environment_of_place(pid: int) -> str | None:
    """Whose process it is; None for one that is not there or not yet itself."""
    try:
        return environment(pid).get("SHIWU_WORKER_NAME")
    except OSError:
        return None


@pytest.mark.long
def test_wrong_settings_are_not_tried_again(launch: Callable[..., WorkerProcess]) -> None:
    """What only a worker can find wrong ends all of them by its own code."""
    box = launch(ready=False, default_labels="no-such-set")
    assert box.wait(timeout_s=90) == ExitCode.CONFIG
    assert len(events(box, "worker_started")) == 2


@pytest.mark.long
def test_workers_end_with_a_killed_launcher(launch: Callable[..., WorkerProcess], ours: Fleet) -> None:
    """No process would restart them: they drain by themselves, and lose nothing."""
    box = launch()
    ids = ours.send(300, prefix="orphan")
    wait_until(lambda: len(answerers(ours.client)) == 2, timeout_s=30)
    processes = family(box.pid)
    assert len(processes) > 4
    box.kill()
    wait_until(lambda: not any(map(lives, processes)), timeout_s=10, what="the end of all processes")
    assert not ours.client.exists(CLAIMS), "they drained"
    launch(args=ONE, name="next")
    assert ours.counted(ids).reaped == 0


@pytest.mark.long
def test_one_card_needs_no_parent(launch: Callable[..., WorkerProcess], ours: Fleet) -> None:
    """The process is the worker: its only child is the fork server."""
    box = launch(args=ONE)
    ours.counted(ours.send(20, prefix="one"))
    assert answerers(ours.client) == {"box"}
    assert not events(box, "worker_started")
    assert len(children(box.pid)) == 1
    box.terminate()
    assert box.wait(timeout_s=30) == 0
