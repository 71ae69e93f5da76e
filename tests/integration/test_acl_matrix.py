"""Every write command that a Redis user has, on each of its keys: others' jobs are tagged all the same."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu import Client, Status
from shiwu.contract import (
    BACKFILL,
    BACKFILL_OPEN,
    BACKFILLS,
    KEY_TYPES,
    RESULT_STREAM,
    WORKER_STATE,
    Lane,
    done_key,
    result_key,
)
from shiwu.hooks.delivery_queue import COMMON_KEYS, pending_key
from tests.support import pictures
from tests.support.redis_server import RedisServer, redis_binary, valkey_binary
from tests.support.redis_users import users_for
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group(__name__)
VICTIM = "order-4711"
LARGEST_ID = "18446744073709551615-18446744073709551615"
KEYS = [*KEY_TYPES, *(key for lane in Lane for key in lane.keys[:1]), result_key(VICTIM), done_key(VICTIM)]
KEYS += [BACKFILLS, f"{BACKFILL}photos", f"{BACKFILL_OPEN}photos"]
KEYS += [f"{WORKER_STATE}host-1"]
KEYS += [*COMMON_KEYS, pending_key("orders")]
KEYS += [f"_kombu.binding{kind}.{lane.queue}" for kind in ("", "_permanent") for lane in Lane]
HOSTILE: dict[str, list[tuple[Any, ...]]] = {
    "lpush": [("x",), ('{"headers": {"id": "order-4711", "task": "shiwu.tag"}, "body": ""}',)],
    "rpush": [("x",)],
    "sadd": [("x",)],
    "hset": [(VICTIM, "x|1|shiwu.bulk|x"), ("answered", "many"), ("result_ttl_s", "0"), ("stream_length", "9" * 30)],
    "hsetnx": [(VICTIM, "x")],
    "hincrby": [("answered", 2**63 - 1), ("dead_dropped", -5)],
    "hdel": [(VICTIM, "answered")],
    "zadd": [("0", "gone"), ("0", VICTIM), ("inf", VICTIM), ("-inf", "\x00")],
    "zrem": [(VICTIM,)],
    "zpopmin": [(1000,)],
    "zremrangebyscore": [("-inf", "+inf")],
    "zremrangebyrank": [(0, -1)],
    "set": [("x",), ("9" * 400,)],
    "setex": [(1, "x")],
    "del": [()],
    "expire": [(1,)],
    "pexpire": [(1,)],
    "persist": [()],
    "rename": [("shiwu:foreign:x",), ("shiwu:claims",)],
    "xadd": [("*", "a", "b"), (LARGEST_ID, "a", "b")],
    "xtrim": [("MAXLEN", 0)],
    "lrem": [(0, "x")],
    "ltrim": [(1, 0)],
    "lmove": [("shiwu.bulk", "LEFT", "RIGHT"), ("shiwu:watch:unread", "LEFT", "LEFT")],
    "blmove": [("shiwu.bulk", "LEFT", "RIGHT", 0.01)],
    "rpop": [()],
    "xgroup|create": [("g", "$", "MKSTREAM")],
    "xgroup|delconsumer": [("g", "c")],
    "xgroup|destroy": [("g",)],
    "xack": [("g", "0-1")],
    "publish": [("x",)],
}
"""Write command → its arguments after the key."""
EACH_BY_ITSELF = ("producer", "client", "consumer", "backfill", "watcher")
USERS = (*EACH_BY_ITSELF, "sweep", "worker")


@dataclass(frozen=True)
class Parts:
    """A server with the users of the file, a worker, and an image."""

    server: RedisServer
    users: str
    image: str

    def client(self, user: str) -> redis.Redis:
        """A plain client of this user."""
        return redis.Redis.from_url(self.url(user), socket_timeout=5)

    def url(self, user: str) -> str:
        """The URL of this user."""
        return self.server.url.replace("://", f"://shiwu-{user}:change-me-{user}@")

    def commands(self, user: str) -> list[str]:
        """The write commands of the user."""
        [line] = [line for line in self.users.splitlines() if line.startswith(f"user shiwu-{user} ")]
        return sorted(set(re.findall(r"\+([a-z|]+)", line)) & set(HOSTILE))


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.slow)])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """One worker with short leases for all rows."""
    folder: Path = tmp_path_factory.mktemp("matrix")
    (folder / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    binary = redis_binary() if request.param == "redis" else valkey_binary()
    (folder / "users.conf").write_text(users_for(binary), encoding="utf-8")
    config = {"include": str(folder / "users.conf")}
    with RedisServer(folder=folder / "server", binary=binary, config=config) as server:
        made = Parts(server, users_for(binary), (folder / "x.png").as_uri())
        options = {"max_batch": 8, "loaders": 1, "loader_spares": 0, "torch_threads": 1, "lease_s": 3}
        with WorkerProcess(redis_url=made.url("worker"), folder=folder, allow_folders=folder, **options) as worker:
            worker.wait_ready()
            yield made
            assert worker.is_running


def attack(parts: Parts, user: str, command: str) -> None:
    """Run the command with each of its arguments on each key; the server refuses most."""
    with parts.client(user) as client:
        for key, arguments in itertools.product(KEYS, HOSTILE[command]):
            words = command.split("|")
            with contextlib.suppress(redis.ResponseError):
                client.execute_command(*words, key, *arguments)


def tag_others(parts: Parts, numbers: Iterator[int]) -> None:
    """Twenty jobs of another producer are tagged."""
    with Client(parts.url("producer")) as producer, Client(parts.url("client")) as client:
        ids = [f"mine-{next(numbers)}" for _ in range(20)]
        items = [{"image": parts.image, "id": job_id} for job_id in ids]

        def is_sent() -> bool:
            # With the users of Redis 6.2 a lane may have a wrong type until it is moved aside.
            with contextlib.suppress(redis.ResponseError):
                return bool(list(producer.enqueue_many(items, answer_by_s=60)))
            return False

        wait_until(is_sent, timeout_s=10, what="a lane that takes messages")
        answers = client.wait_many(ids, timeout_s=30)
    assert {answers[job_id].status for job_id in ids} == {Status.TAGGED}


@pytest.mark.parametrize("user", USERS)
def test_hostile_user_does_not_stop_others(parts: Parts, user: str) -> None:
    """After each command of users that act for others, and after all commands of the rest, jobs are tagged in time."""
    numbers = itertools.count(USERS.index(user) * 100_000)
    commands = parts.commands(user)
    assert commands or user == "consumer"
    for command in commands:
        attack(parts, user, command)
        if user in EACH_BY_ITSELF:
            tag_others(parts, numbers)
    tag_others(parts, numbers)
    if user in ("producer", "consumer"):
        with parts.client("admin") as admin:
            assert not admin.exists(result_key("gone"), done_key("gone"))
            streamed: Any = admin.xrange(RESULT_STREAM)
            named = {fields.get(b"id", b"").decode() for _, fields in streamed}
        # The only message with the victim's id is the one that this user sent itself.
        assert {name for name in named if not name.startswith(("mine-", "~", VICTIM))} <= {""}
