"""Celery's own tools with a worker: `-Q`, `--logfile`, `inspect`, `status`, `call`; and its time zone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from celery import Celery

from shiwu import Client
from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request, result_key
from shiwu_worker.celery_worker.lane_worker import ADMIN_QUEUE, choose_lanes
from shiwu_worker.celery_worker.worker_app import make_app
from shiwu_worker.config.settings import Settings
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.processes import clean_environment
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

SHANGHAI = ZoneInfo("Asia/Shanghai")


class BulkWorker(WorkerProcess):
    """`celery -A shiwu_worker.app worker -Q shiwu.bulk --logfile F 2>&-`, as `celery multi` starts one."""

    def __init__(self, *, folder: Path, redis_url: str, **settings: object) -> None:
        self.log_file = folder / "celery-side.log"
        super().__init__(
            redis_url=redis_url,
            folder=folder,
            name="bulk",
            by_celery=True,
            celery_args=f"-Q {Lane.BULK.queue} --logfile {self.log_file} -n bulk@here",
            max_batch=8,
            **settings,
        )
        self.command = ["sh", "-c", 'exec "$0" "$@" 2>&-', *self.command]

    def logged(self) -> str:
        """All lines of the log, those of a rotated file first."""
        files = (self.log_file.with_suffix(".1"), self.log_file)
        return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BulkWorker]:
    """One for all tests here: it serves bulk alone, and takes times without a zone for Shanghai's."""
    folder = tmp_path_factory.mktemp("celery-side")
    (folder / "x.png").write_bytes(pictures.png(pictures.picture("熊猫")))
    with (
        Valkey(folder=folder / "valkey") as server,
        BulkWorker(folder=folder, redis_url=server.url, allow_folders=folder, timezone="Asia/Shanghai") as running,
    ):
        yield running.wait_ready()


@pytest.fixture
def image(worker: BulkWorker) -> str:
    """An image that the worker may read."""
    return (worker.log_file.parent / "x.png").as_uri()


def test_worker_with_one_lane_leaves_the_other(worker: BulkWorker, image: str) -> None:
    """The log goes to Celery's file, also where standard error is closed."""
    with Client(worker.redis_url) as client, redis.Redis.from_url(worker.redis_url) as near:
        client.enqueue(image, id="other-lane", lane="interactive")
        assert client.wait(client.enqueue(image, id="own-lane", lane="bulk"), timeout_s=30).ok
        assert client.queue_state().waiting[Lane.INTERACTIVE] == 1
        assert client.answer("other-lane") is None
        near.delete(Lane.INTERACTIVE.queue)
    events = [json.loads(line)["event"] for line in worker.logged().splitlines() if line.startswith("{")]
    assert "ready" in events
    wait_until(lambda: '"own-lane"' in worker.logged(), timeout_s=10, what="the line of the job")


def test_log_file_that_was_moved_is_reopened(worker: BulkWorker, image: str) -> None:
    """Log rotation renames it; later lines are in a new file of the old name."""
    moved = worker.log_file.with_suffix(".1")
    worker.log_file.rename(moved)

    def is_told() -> bool:
        with Client(worker.redis_url) as client:
            client.wait(client.enqueue(image, lane="bulk"), timeout_s=30)
        return worker.log_file.exists() and '"tagged"' in worker.log_file.read_text()

    wait_until(is_told, timeout_s=20, every_s=0.3, what="a line in the new file")


@pytest.mark.parametrize("field", ["eta", "expires"])
def test_time_without_a_zone_is_in_the_zone_of_the_worker(worker: BulkWorker, image: str, field: str) -> None:
    """An hour ago in Shanghai is seven hours from now in UTC: the job is due, or has expired."""
    naive = (datetime.now(SHANGHAI) - timedelta(hours=1)).replace(tzinfo=None)
    raw = json.loads(build_message(Request(image=image), job_id=f"naive-{field}", lane=Lane.BULK))
    raw["headers"][field] = naive.isoformat()
    with Client(worker.redis_url) as client, redis.Redis.from_url(worker.redis_url) as near:
        near.lpush(Lane.BULK.queue, json.dumps(raw))
        result = client.wait(f"naive-{field}", timeout_s=20)
    assert str(result.status) == {"eta": "tagged", "expires": "expired"}[field]


def asked(app: Celery, command: str) -> Any:
    """Return the reply to a command of `celery inspect`, with a longer timeout for busy machines."""
    replies = wait_until(
        getattr(app.control.inspect(timeout=2.0), command), timeout_s=40, what=f"an answer to {command}"
    )
    assert list(replies) == ["bulk@here"]
    return replies["bulk@here"]


def test_inspect_ping_and_stats_are_answered(worker: BulkWorker) -> None:
    """`celery status` is a ping; stats have lanes and answers."""
    with celery_client(worker.redis_url, has_results=False) as app:
        assert asked(app, "ping") == {"ok": "pong"}
        stats = asked(app, "stats")
    assert stats["shiwu"]["lanes"] == [Lane.BULK.queue]
    assert stats["total"].get("shiwu.tag", 0) >= 0
    assert stats["pid"] > 0


def test_other_control_commands_are_ignored(worker: BulkWorker, image: str) -> None:
    """Neither executed nor answered; the same holds for a ping with a queue of its own for the reply."""
    with celery_client(worker.redis_url, has_results=False) as app, redis.Redis.from_url(worker.redis_url) as near:
        asked(app, "ping")
        for command in ("shutdown", "pool_restart", "add_consumer", "cancel_consumer", "rate_limit", "autoscale"):
            assert app.control.broadcast(command, reply=True, timeout=0.2) == []
        assert app.control.inspect(timeout=0.2).registered() is None
        near.sadd("_kombu.binding.theirs", b"\x06\x16\x06\x16shiwu.interactive")
        with app.connection_for_write() as connection:
            mailbox = app.control.mailbox(connection)
            for reply_to in (
                {"exchange": "", "routing_key": Lane.INTERACTIVE.queue},
                {"exchange": "theirs"},
                "x",
                ["y"],
            ):
                ping = {"method": "ping", "arguments": {}, "reply_to": reply_to, "ticket": "t"}
                with connection.channel() as channel, app.amqp.Producer(channel) as producer:
                    producer.publish(
                        ping, exchange=mailbox.exchange.name, declare=[mailbox.exchange], serializer="json"
                    )
        assert asked(app, "ping") == {"ok": "pong"}
        assert near.llen(Lane.INTERACTIVE.queue) == 0
    with Client(worker.redis_url) as client:
        assert client.wait(client.enqueue(image, lane="bulk"), timeout_s=30).ok


def test_call_and_delay_of_the_app_reach_a_lane(redis_url: str, redis_client: redis.Redis) -> None:
    """Celery's default queue is not used; lanes may be named, other queues may not."""
    app = make_app(Settings(redis_url=redis_url))  # type: ignore[arg-type]  # pydantic reads the text
    try:
        app.tasks["shiwu.tag"].delay(image="s3://b/k")
        app.send_task("shiwu.tag", args=["s3://b/k"])
        app.tasks["shiwu.tag"].apply_async(args=["s3://b/k"], queue="shiwu.bulk")
        assert [redis_client.llen(lane.queue) for lane in Lane] == [2, 1]
        assert redis_client.llen(ADMIN_QUEUE) == 0
        assert list(app.amqp.queues.consume_from) == [ADMIN_QUEUE], "Celery's consumer reads no lane"
        assert list(app.amqp.queues) == [ADMIN_QUEUE], "and `celery purge` deletes none"
    finally:
        app.close()
    command = [sys.executable, "-m", "celery", "-A", "shiwu_worker.app", "call", "shiwu.tag", "--kwargs", "{}"]
    done = subprocess.run(
        command,
        env=clean_environment({"SHIWU_REDIS_URL": redis_url}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert redis_client.llen(Lane.INTERACTIVE.queue) == 3


BOTH = tuple(Lane)


@pytest.mark.parametrize(
    ("include", "exclude", "default", "chosen"),
    [
        ([], [], BOTH, BOTH),
        ([], [], (Lane.BULK,), (Lane.BULK,)),
        (["shiwu.interactive"], [], BOTH, (Lane.INTERACTIVE,)),
        (["shiwu.bulk", "shiwu.interactive"], [], (Lane.BULK,), BOTH),
        (["shiwu.admin"], [], (Lane.BULK,), (Lane.BULK,)),
        ([], ["shiwu.bulk"], BOTH, (Lane.INTERACTIVE,)),
    ],
)
def test_lanes_of_a_command_line(
    include: list[str], exclude: list[str], default: tuple[Lane, ...], chosen: tuple[Lane, ...]
) -> None:
    """`-Q` replaces SHIWU_LANES, `-X` takes away."""
    assert choose_lanes(include, exclude, default=default) == chosen


@pytest.mark.parametrize("arguments", ["-Q celery", "-Q shiwu.interactive,typo", "-X shiwu.bulk,shiwu.interactive"])
def test_queue_that_is_not_a_lane_is_refused(redis_url: str, arguments: str) -> None:
    """Exit code 64 and an error text, before the model is loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shiwu_worker.app", "worker", *arguments.split()],
        env=clean_environment({"SHIWU_REDIS_URL": redis_url}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 64
    assert "-Q and -X: expected" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [("bulk", (Lane.BULK,)), ("shiwu.bulk, interactive", BOTH), ("", BOTH), ("interactive", (Lane.INTERACTIVE,))],
)
def test_setting_names_lanes(lanes: str, expected: tuple[Lane, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names or by those of their queues."""
    monkeypatch.setenv("SHIWU_LANES", lanes)
    assert Settings().lanes == expected


@pytest.mark.parametrize(("name", "value"), [("lanes", "fast"), ("timezone", "Mars/Olympus"), ("timezone", "../etc")])
def test_setting_without_a_lane_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was expected and what came."""
    monkeypatch.setenv(f"SHIWU_{name.upper()}", value)
    with pytest.raises(ValueError, match=f"expected .*{value[:4]}"):
        Settings()


def test_sweep_reads_times_in_its_zone(redis_url: str, redis_client: redis.Redis) -> None:
    """A job that expired in Shanghai is answered where no worker runs."""
    naive = (datetime.now(UTC) + timedelta(hours=1)).replace(tzinfo=None)
    raw = json.loads(build_message(Request(image="s3://b/k"), job_id="zone", lane=Lane.BULK))
    raw["headers"]["expires"] = naive.isoformat()
    redis_client.lpush(Lane.BULK.queue, json.dumps(raw))
    with Client(redis_url) as client:
        assert client.sweep().expired == 0
        assert client.sweep(zone=SHANGHAI).expired == 1
    assert redis_client.exists(result_key("zone")) == 1
