"""A backfill that is killed at any moment: each object has one row in the end, and no job has two answers."""

from __future__ import annotations

import contextlib
import random
import threading
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import redis

from shiwu.contract import COUNTERS, RESULT_STREAM
from tests.support.answering import AnsweringWorker
from tests.support.backfills import BackfillProcess, references_of, summary_of
from tests.support.servers import S3Server, Valkey
from tests.support.waiting import wait_until

ODD: Final = ["a+b.jpg", "c%20d.jpg", "e f.jpg", "new\nline.jpg", "猫/狗.jpg", "?x#y.jpg", "~.jpg"]
pytestmark = pytest.mark.xdist_group(__name__)


def put_objects(s3: S3Server, prefix: str, count: int) -> set[str]:
    """Small objects with plain and odd names below a prefix; returns their references."""
    keys = [f"{prefix}/{number:06}.jpg" for number in range(count - len(ODD))] + [f"{prefix}/{key}" for key in ODD]
    threads = 4

    def put(first: int) -> None:
        with contextlib.closing(s3.new_client()) as client:
            for key in keys[first::threads]:
                client.put_object(Bucket=s3.bucket, Key=key, Body=b"x")

    workers = [threading.Thread(target=put, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    return {f"s3://{s3.bucket}/{key}" for key in keys}


def run_with_kills(
    valkey: Valkey,
    s3: S3Server,
    folder: Path,
    *,
    prefix: str,
    objects: int,
    kills: int,
    part_rows: int,
    kills_workers: bool,
) -> None:
    """Run one backfill, killed so many times: each time after a random number of further answers."""
    chance = random.Random(20261130)
    args = ["start", "night", f"s3://{s3.bucket}/{prefix}/", "--out", str(folder / "out")]
    args += ["--part-rows", str(part_rows), "--max-waiting", "400"]
    worker = AnsweringWorker(redis_url=valkey.url, folder=folder, pause_ms=20, batch=20)
    with worker, valkey.client() as client:
        for number in range(kills):
            # The last kill comes before all objects are sent, so that there always is something to kill.
            answers = int(objects * (number + chance.random()) / (kills + 1))
            with BackfillProcess(*args, redis_url=valkey.url, folder=folder, env=s3.env) as run:
                reached = partial(_has_reached, client, run, run_number=number + 1, answers=answers)
                wait_until(reached, timeout_s=120, what=f"{answers} answers")
                run.kill()
            if kills_workers and number % 3 == 2:
                worker.kill()
                worker.start()
        with BackfillProcess(*args, redis_url=valkey.url, folder=folder, env=s3.env) as run:
            assert run.wait(timeout_s=120) == 0, run.log_tail()


def _has_reached(client: redis.Redis, run: BackfillProcess, *, run_number: int, answers: int) -> bool:
    assert run.is_running, run.log_tail()
    takes = int(client.hget("shiwu:backfill:night", "takes") or 0)
    return takes >= run_number and int(client.hget(COUNTERS, "answered") or 0) >= answers


def check_rows(valkey: Valkey, folder: Path, references: set[str]) -> None:
    """Each object has one row, each job one answer, and nothing is left in Redis but the state and the answers."""
    found = references_of(folder / "out")
    assert set(found) == references
    assert set(found.values()) == {1}
    summary = summary_of(folder / "out")
    assert (summary["read"], summary["answered"], summary["rows"]) == (len(references),) * 3
    with valkey.client() as client:
        assert int(client.hget(COUNTERS, "answered") or 0) == len(references) - 1  # one name cannot be a job
        assert client.xinfo_groups(RESULT_STREAM) == []
        assert not client.exists("shiwu:backfill:open:night")


def test_killed_backfill_has_each_object_once(valkey: Valkey, s3: S3Server, tmp_path: Path) -> None:
    """Five kills while 2,000 objects are listed, sent, collected and written in parts of 100 rows."""
    references = put_objects(s3, "killed", 2000)
    run_with_kills(valkey, s3, tmp_path, prefix="killed", objects=2000, kills=5, part_rows=100, kills_workers=False)
    check_rows(valkey, tmp_path, references)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_kills_of_command_and_workers(valkey: Valkey, s3: S3Server, tmp_path: Path) -> None:
    """25 kills of the command and some of the workers, with 20,000 objects."""
    references = put_objects(s3, "long", 20_000)
    run_with_kills(valkey, s3, tmp_path, prefix="long", objects=20_000, kills=25, part_rows=700, kills_workers=True)
    check_rows(valkey, tmp_path, references)


def test_paused_process_loses_to_its_successor(valkey: Valkey, s3: S3Server, tmp_path: Path) -> None:
    """A process that hangs while another one takes over ends without changing anything."""
    references = put_objects(s3, "hung", 300)
    args = ["start", "night", f"s3://{s3.bucket}/hung/", "--out", str(tmp_path / "out"), "--rate", "200/s"]
    with AnsweringWorker(redis_url=valkey.url, folder=tmp_path):
        first = BackfillProcess(*args, redis_url=valkey.url, folder=tmp_path, env=s3.env, name="first")
        second = BackfillProcess(*args, redis_url=valkey.url, folder=tmp_path, env=s3.env, name="second")
        with first, valkey.client() as client:
            _wait_sent(client, first)
            first.pause()
            with second:
                assert second.wait(timeout_s=60) == 0, second.log_tail()
            first.resume()
            assert first.wait(timeout_s=30) == 4
    assert "another process runs this backfill" in first.log_text()
    check_rows(valkey, tmp_path, references)


def _wait_sent(client: redis.Redis, run: BackfillProcess) -> None:

    wait_until(lambda: int(client.hget("shiwu:backfill:night", "sent") or 0) > 50 or not run.is_running, timeout_s=30)
    assert run.is_running, run.log_tail()
