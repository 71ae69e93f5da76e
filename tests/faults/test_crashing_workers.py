"""Workers and loaders that are stopped, killed or paused under load: every id is answered, and once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis

from shiwu.client import Client
from shiwu.contract import ATTEMPTS, CLAIMS, LEASES, Lane, Status
from tests.conftest import StartWorker
from tests.faults.conftest import LEASE_S, Fleet
from tests.support import drill, pictures
from tests.support.family import children, lives, loaders_of
from tests.support.picture_server import PictureServer, Reply
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

GOOD = Reply.picture(pictures.png(pictures.picture().resize((64, 64))), content_type="image/png")
SLOW = GOOD.late(first_pause_s=30)


def waiting(client: redis.Redis) -> int:
    """Messages in both lanes."""
    return sum(client.llen(lane.queue) for lane in Lane)


def tokens(client: redis.Redis, worker: WorkerProcess) -> int:
    """How many claims are in the hands of a worker."""
    return sum(token.startswith(f"{worker.name}.".encode()) for token in drill.tokens(client))


def test_sigterm_under_load_finishes_or_gives_back(fleet: Fleet, far: WorkerProcess) -> None:
    """SIGTERM in the middle: exit 0 within the grace time, nothing claimed, a second worker answers the rest."""
    ids = fleet.send(400, prefix="term")
    wait_until(lambda: drill.answered(fleet.client) > 50, timeout_s=30)
    far.terminate()
    assert far.wait(timeout_s=20) == 0
    assert fleet.client.exists(CLAIMS, LEASES) == 0
    assert not far.ready_file.exists()
    fleet.wake(fleet.near)
    result = fleet.counted(ids)
    assert (result.reaped, result.discarded, result.attempts) == (0, 0, {1: 400})


def test_probe_files_that_cannot_be_written(fleet: Fleet, far: WorkerProcess) -> None:
    """Delayed jobs return to their lane, and SIGTERM drains: the files tell probes something and decide nothing."""
    far.alive_file.unlink()
    far.alive_file.symlink_to(far.alive_file.parent / "no folder" / "alive")
    far.ready_file.unlink()
    far.ready_file.mkdir()
    client = Client(fleet.url)
    try:
        result = client.wait(client.enqueue(fleet.images[0], countdown_s=1.5), timeout_s=30)
        assert result.status == Status.TAGGED
        far.terminate()
        assert far.wait(timeout_s=20) == 0
    finally:
        client.close()
        far.alive_file.unlink()
        far.ready_file.rmdir()
    assert fleet.client.exists(CLAIMS, LEASES) == 0
    assert far.log_text().count('"probe_file_failed"') == 2


def test_sigterm_with_a_claim_in_flight(fleet: Fleet, far: WorkerProcess) -> None:
    """Redis has executed the claim and its reply is on the way: exit 0, nothing left claimed, no try counted."""
    fleet.wait_settled(far)
    fleet.proxy.delay(0.3)
    ids = fleet.send(60, prefix="flight")
    wait_until(lambda: fleet.client.hlen(CLAIMS) > 0, timeout_s=10, every_s=0.005)
    far.terminate()
    assert far.wait(timeout_s=20) == 0
    assert fleet.client.exists(CLAIMS, LEASES, ATTEMPTS) == 0
    assert waiting(fleet.client) + drill.answered(fleet.client) == 60
    fleet.wake(fleet.near)
    result = fleet.counted(ids)
    assert (result.reaped, result.discarded, result.attempts) == (0, 0, {1: 60})


def test_a_second_sigterm_gives_back_at_once(fleet: Fleet, far: WorkerProcess, http_server: PictureServer) -> None:
    """Jobs that hang in a slow fetch are given back to the front of their lane without waiting for the grace time."""
    fleet.wait_settled(far)
    fleet.send(4, prefix="hurry", images=[http_server.serve("/slow.png", SLOW)])
    wait_until(lambda: fleet.client.hlen(CLAIMS) == 4, timeout_s=20)
    said = far.log_text().count('"stopping"')
    far.terminate()
    wait_until(lambda: far.log_text().count('"stopping"') > said, timeout_s=5)
    far.terminate()
    assert far.wait(timeout_s=10) == 0, "the grace time is 15 s"
    assert fleet.client.hlen(CLAIMS) == 0
    assert waiting(fleet.client) == 4


def test_sigkill_in_the_middle_of_a_drain(fleet: Fleet, far: WorkerProcess, http_server: PictureServer) -> None:
    """An orchestrator that loses its patience: what was not finished is another's one lease later, tried twice.

    Four images, because one source gets half of the eight loader threads: each must have been asked for before the end.
    """
    fleet.wait_settled(far)
    images = [http_server.serve(f"/slow-{number}.png", SLOW, GOOD) for number in range(4)]
    ids = [job_id for n, image in enumerate(images) for job_id in fleet.send(1, prefix=f"drain{n}", images=[image])]
    wait_until(lambda: fleet.client.hlen(CLAIMS) == 4, timeout_s=10)
    said = far.log_text().count('"stopping"')
    far.terminate()
    wait_until(lambda: far.log_text().count('"stopping"') > said, timeout_s=5)
    far.kill()
    assert fleet.client.hlen(CLAIMS) == 4
    fleet.wake(fleet.near)
    wait_until(lambda: not tokens(fleet.client, far), timeout_s=LEASE_S + 2)
    result = fleet.counted(ids)
    assert (result.reaped, result.discarded, result.attempts) == (4, 0, {2: 4})


def test_a_stopped_worker_that_is_killed_takes_nothing_with_it(fleet: Fleet, far: WorkerProcess) -> None:
    """SIGSTOP, push, SIGKILL: Redis notifies a connection that is not read any more, and nothing is lost."""
    fleet.wait_settled(far)
    far.pause()
    ids = fleet.send(40, prefix="stopped")
    far.kill()
    fleet.wake(fleet.near)
    result = fleet.counted(ids)
    assert (result.reaped, result.attempts) == (0, {1: 40})


@pytest.mark.slow
def test_sigkill_loses_nothing_and_answers_nothing_twice(fleet: Fleet, far: WorkerProcess) -> None:
    """A worker dies with jobs claimed, and its loaders with it; a living one has them in one lease and two seconds."""
    fleet.wake(fleet.near)
    loaders = [*children(far.pid), *loaders_of(far.pid)]
    assert len(loaders) == 3, "the fork server and two loaders"
    ids = fleet.send(600, prefix="kill")
    wait_until(lambda: drill.answered(fleet.client) > 100, timeout_s=30)
    wait_until(lambda: tokens(fleet.client, far), timeout_s=10, every_s=0.0)
    far.kill()
    wait_until(lambda: not tokens(fleet.client, far), timeout_s=LEASE_S + 2)
    assert not any(lives(pid) for pid in loaders), "no loader process is left"
    result = fleet.counted(ids)
    assert result.reaped > 0
    assert result.attempts[2] == result.reaped


def test_a_killed_loader_is_replaced_and_its_jobs_are_answered(fleet: Fleet, near: WorkerProcess) -> None:
    """SIGKILL of loaders under load costs no job its answer, and the worker itself goes on."""
    replaced = near.log_text().count("loader_replaced")
    ids = fleet.send(500, prefix="loader")
    for number, threshold in enumerate((50, 180, 310), start=1):
        wait_until(lambda threshold=threshold: drill.answered(fleet.client) > threshold, timeout_s=60)
        os.kill(loaders_of(near.pid)[0], signal.SIGKILL)
        wait_until(lambda n=number: near.log_text().count("loader_replaced") >= replaced + n, timeout_s=10)
    result = fleet.counted(ids)
    assert (result.reaped, result.statuses) == (0, {"tagged": 500})


def test_a_model_that_does_not_load_ends_the_worker(start_worker: StartWorker, redis_url: str, tmp_path: Path) -> None:
    """Never ready, and an exit code with a name."""
    (tmp_path / "model").mkdir()
    worker = start_worker(redis_url=redis_url, ready=False, model=tmp_path / "model")
    assert worker.wait(timeout_s=60) == 65
    assert not worker.ready_file.exists()
    assert '"reason": "MODEL"' in worker.log_text()
