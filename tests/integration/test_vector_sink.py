"""`shiwu vectors sink`: each vector is stored once, whenever the sink ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu.broker.connection import connect
from shiwu.contract import RESULT_STREAM
from shiwu.parts import Objects, Target, TargetError, open_target
from shiwu.vectors import sink as sink_module
from shiwu.vectors.sink import CONSUMER, TEMPORARY, VectorSink, check_alone, check_start
from shiwu_worker.retag.vector_parts import VectorParts
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import clean_environment
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.redis_users import users_for
from tests.support.servers import S3Server
from tests.support.vector_answers import (
    GROUP,
    WIDTH,
    add_answers,
    answer_of,
    expected_ids,
    sink_process,
    stored_ids,
)
from tests.support.waiting import wait_until


def pending(client: redis.Redis) -> int:
    """How many entries the group has not acknowledged."""
    found: Any = client.xpending(RESULT_STREAM, GROUP)
    return int(found["pending"])


def target_of(out: Path | str, environment: dict[str, str] | None = None) -> Target:
    """The folder or bucket of parts."""
    return open_target(str(out), objects=Objects(environment), temporary=TEMPORARY)


def drain(url: str, target: Target, *, part_rows: int = 7, part_age_s: float = 3600.0) -> VectorSink:
    """Store all answers that are there, in this process."""
    with closing(connect(url, timeout_s=5)) as client, closing(connect(url, timeout_s=5)) as acks:
        made = VectorSink(
            clients=[client],
            acks=[acks],
            target=target,
            group=GROUP,
            part_rows=part_rows,
            part_age_s=part_age_s,
            is_stopping_when_idle=True,
        )
        while not made.is_at_end:
            made.step(block_s=0.01)
        made.record()
    return made


def test_each_vector_is_in_one_part(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """In parts of the size asked for, which retag can read; answers without a vector are acknowledged."""
    add_answers(redis_client, *(answer_of(n) for n in range(40)))
    made = drain(redis_url, target_of(tmp_path))
    assert stored_ids(tmp_path) == expected_ids(range(40))
    assert (made.stored, made.damaged, pending(redis_client)) == (32, 0, 0)
    parts = VectorParts(str(tmp_path))
    assert [len(block.vectors) for block in parts.blocks(rows=100)] == [7, 7, 7, 7, 4]
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


class Crash(Exception):
    """The process ends here."""


@pytest.mark.parametrize("place", ["before_stage", "after_stage", "after_publish", "between_acks"])
def test_sink_that_ends_at_any_effect_stores_each_once(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The next one, with parts of another size, stores what is missing and nothing twice."""
    add_answers(redis_client, *(answer_of(n) for n in range(40)))
    target = target_of(tmp_path)
    count = 0

    def crashing(method: Callable[..., Any], *, is_done: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == 2 and not is_done:
                raise Crash
            result = method(*args, **kwargs)
            if count == 2:
                raise Crash
            return result

        return call

    if place == "between_acks":
        monkeypatch.setattr("shiwu.client.stream_items.ACK_CHUNK_SIZE", 3)
        monkeypatch.setattr(redis.Redis, "xack", crashing(redis.Redis.xack, is_done=True))
    else:
        name = "publish" if place == "after_publish" else "stage"
        monkeypatch.setattr(target, name, crashing(getattr(target, name), is_done=place != "before_stage"))
    with pytest.raises(Crash):
        drain(redis_url, target)
    monkeypatch.undo()
    assert pending(redis_client) > 0
    add_answers(redis_client, *(answer_of(n) for n in range(40, 50)))
    drain(redis_url, target_of(tmp_path), part_rows=11)
    assert stored_ids(tmp_path) == expected_ids(range(50))
    assert pending(redis_client) == 0
    assert [name for name in os.listdir(tmp_path) if name.startswith(TEMPORARY)] == []


def test_parts_of_a_deleted_group_are_not_stored_again(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """A new group begins with the oldest answer, and the parts tell what is stored."""
    add_answers(redis_client, *(answer_of(n) for n in range(20)))
    drain(redis_url, target_of(tmp_path))
    redis_client.xgroup_destroy(RESULT_STREAM, GROUP)
    add_answers(redis_client, *(answer_of(n) for n in range(20, 30)))
    drain(redis_url, target_of(tmp_path))
    assert stored_ids(tmp_path) == expected_ids(range(30))


def test_acknowledgements_that_a_failover_lost_are_made_again(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Otherwise the workers would report what is stored as dropped once the stream is trimmed."""
    add_answers(redis_client, *(answer_of(n) for n in range(20)))
    with (
        FaultProxy(redis_url) as proxy,
        closing(connect(proxy.url, timeout_s=5)) as client,
        closing(connect(proxy.url, timeout_s=5)) as acks,
    ):
        made = VectorSink(
            clients=[client], acks=[acks], target=target_of(tmp_path), group=GROUP, part_rows=9, part_age_s=3600.0
        )
        wait_until(lambda: made.step(block_s=0.01) or pending(redis_client) == 7, timeout_s=20, what="one part")
        before: Any = redis_client.dump(RESULT_STREAM)
        made.record()
        assert pending(redis_client) == 0
        redis_client.restore(RESULT_STREAM, 0, before, replace=True)
        assert pending(redis_client) == 7
        proxy.refuse()
        made.step(block_s=0.01)
        proxy.heal()
        wait_until(lambda: made.step(block_s=0.01) or pending(redis_client) == 0, timeout_s=20)
    assert stored_ids(tmp_path) == expected_ids(range(20))


def test_vectors_of_two_widths_are_in_two_parts(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """As after a change of the model."""
    add_answers(redis_client, *(answer_of(n, width=WIDTH if n < 10 else 2 * WIDTH) for n in range(20)))
    drain(redis_url, target_of(tmp_path), part_rows=100)
    assert stored_ids(tmp_path) == expected_ids(range(20))
    assert len(list(tmp_path.glob("*.parquet"))) == 2


@pytest.mark.parametrize("vector", ["", "no base64", "YWJj"])
def test_damaged_vector_is_counted_and_costs_no_other(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, vector: str
) -> None:
    """It is acknowledged, because it would never become readable."""
    add_answers(redis_client, answer_of(1), answer_of(2, vector=vector), answer_of(3))
    made = drain(redis_url, target_of(tmp_path))
    assert sorted(stored_ids(tmp_path)) == ["id-1", "id-3"]
    assert (made.damaged, pending(redis_client)) == (1, 0)


def test_parts_go_to_a_bucket(
    redis_url: str, redis_client: redis.Redis, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under their names only, by the settings of a worker."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    add_answers(redis_client, *(answer_of(n) for n in range(20)))
    address = f"s3://{s3.bucket}/kept/{tmp_path.name}/"
    with closing(target_of(address)) as target:
        drain(redis_url, target, part_rows=10)
        names = target.names()
    assert len(names) == 2
    for name in names:
        Objects().download(f"{address}{name}", tmp_path / name)
    assert stored_ids(tmp_path) == expected_ids(range(20))


def test_sigterm_completes_the_part(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """Exit code 0, everything acknowledged."""
    add_answers(redis_client, *(answer_of(n) for n in range(20)))
    with sink_process(redis_url, tmp_path, tmp_path / "out") as process:
        wait_until(lambda: redis_client.exists(RESULT_STREAM) and _delivered(redis_client) == 20, timeout_s=30)
        process.signal(signal.SIGTERM)
        assert process.wait(timeout_s=20) == 0
    assert stored_ids(tmp_path / "out") == expected_ids(range(20))
    assert pending(redis_client) == 0


def _delivered(client: redis.Redis) -> int:
    groups: Any = client.xinfo_groups(RESULT_STREAM)
    return sum(int(group["pending"]) for group in groups)


def test_acl_user_of_consumers_can_run_a_sink(tmp_path: Path) -> None:
    """A second one looks for the first: the server refuses no command."""
    binary = valkey_binary()
    (tmp_path / "users.conf").write_text(users_for(binary), encoding="utf-8")
    config = {"include": str(tmp_path / "users.conf")}
    with RedisServer(folder=tmp_path / "server", binary=binary, config=config) as server:
        admin_url, url = (server.url.replace("://", f"://shiwu-{u}:change-me-{u}@") for u in ("admin", "consumer"))
        with closing(redis.Redis.from_url(admin_url, socket_timeout=5)) as admin:
            add_answers(admin, answer_of(1), answer_of(2))
            for _ in range(2):
                with sink_process(url, tmp_path, tmp_path / "out", "--stop-when-idle") as process:
                    assert process.wait(timeout_s=60) == 0, process.log_tail()
            assert admin.acl_log() == []
    assert sorted(stored_ids(tmp_path / "out")) == ["id-1", "id-2"]


def test_second_sink_of_a_group_is_refused(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one asks for entries; a group without a sink, and no group at all, are free."""
    monkeypatch.setattr(sink_module, "OTHER_SINK_WAIT_S", 0.3)
    check_alone([redis_client], GROUP)
    redis_client.xgroup_create(RESULT_STREAM, GROUP, id="0", mkstream=True)
    check_alone([redis_client], GROUP)
    redis_client.xgroup_createconsumer(RESULT_STREAM, GROUP, CONSUMER)
    with pytest.raises(TargetError, match="expected no other sink of the group vectors"):
        check_alone([redis_client], GROUP)
    monkeypatch.setattr(sink_module, "OTHER_SINK_IDLE_S", 0.1)
    check_alone([redis_client], GROUP)


def test_sink_waits_for_redis_at_its_start(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """It says so, goes on when Redis is back, and SIGTERM ends the wait with 0."""
    add_answers(redis_client, *(answer_of(n) for n in range(20)))
    with FaultProxy(redis_url) as proxy:
        proxy.refuse()
        with sink_process(proxy.url, tmp_path, tmp_path / "out", "--stop-when-idle") as process:
            wait_until(lambda: "redis_away" in process.log_text(), timeout_s=30, what="a line about Redis")
            proxy.heal()
            assert process.wait(timeout_s=60) == 0, process.log_text()
            assert "trying again" in process.log_text()
            assert "Redis answers again" in process.log_text()
        assert stored_ids(tmp_path / "out") == expected_ids(range(20))
        proxy.refuse()
        (tmp_path / "second").mkdir()
        with sink_process(proxy.url, tmp_path / "second", tmp_path / "other") as process:
            wait_until(lambda: "redis_away" in process.log_text(), timeout_s=30, what="a line about Redis")
            assert process.stop() == 0, process.log_text()


def test_start_of_a_sink_waits_for_a_limited_time(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the error ends it. An error that time cannot cure ends it at once, and so does a stop."""
    monkeypatch.setattr(sink_module, "START_AWAY_S", 0.2)
    with FaultProxy(redis_url) as proxy, closing(connect(proxy.url, timeout_s=5)) as client:
        proxy.refuse()
        with pytest.raises(redis.ConnectionError):
            check_start([client], GROUP, stop=threading.Event())
        stop = threading.Event()
        stop.set()
        check_start([client], GROUP, stop=stop)
    monkeypatch.setattr(sink_module, "START_AWAY_S", 1e9)
    refused = connect(redis_url.replace("://", "://nobody:wrong@"), timeout_s=5)
    with closing(refused), pytest.raises(redis.AuthenticationError):
        check_start([refused], GROUP, stop=threading.Event())


def test_command_without_pyarrow_names_the_extra(redis_url: str) -> None:
    """In a line, with the exit code of a wrong use."""
    script = (
        "import importlib.util as u, sys\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pyarrow' else found(name, *a)\n"
        "from shiwu.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "--redis-url", redis_url, "vectors", "sink", "--group", "g", "--out", "o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean_environment({}))
    assert done.returncode == 2
    assert "vectors sink needs pyarrow: run `pip install '.[vectors]'`" in done.stderr


@pytest.mark.long
def test_killed_sinks_lose_and_double_nothing(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """Killed at random moments while answers come, in parts of a few rows."""
    chance = random.Random(20261130)
    out, count = tmp_path / "out", 0
    args = ["--part-rows", "13", "--part-age", "0.05"]
    for _ in range(8):
        with sink_process(redis_url, tmp_path, out, *args) as process:
            before = len(list(out.glob("*.parquet"))) if out.exists() else 0
            wanted = before + chance.randrange(1, 6)

            def has_parts(wanted: int = wanted) -> bool:
                nonlocal count
                add_answers(redis_client, *(answer_of(n) for n in range(count, count + 10)))
                count += 10
                return out.exists() and len(list(out.glob("*.parquet"))) >= wanted

            wait_until(has_parts, timeout_s=60)
            process.kill()
    with sink_process(redis_url, tmp_path, out, "--stop-when-idle") as process:
        assert process.wait(timeout_s=60) == 0, process.log_tail()
    assert stored_ids(out) == expected_ids(range(count))
    assert pending(redis_client) == 0
    assert [name for name in os.listdir(out) if name.startswith(".")] == []
