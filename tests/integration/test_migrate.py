"""A database of an earlier version: a worker refuses it, `shiwu migrate` moves it, and each job is answered once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from shiwu import Client
from shiwu.broker.migration import MAX_MOVED, OldNames, check_names, move_names
from shiwu.broker.migration.old_names import DROPPED, MOVES
from shiwu.broker.redis_errors import RedisCode, WrongShardCount, classify
from shiwu.broker.script_loader import load_script
from shiwu.broker.sharding import keep_shard_count
from shiwu.cli import main
from shiwu.contract import (
    CANVAS,
    CANVAS_DUE,
    COUNTERS,
    DELAYED,
    DELAYED_MESSAGES,
    PENDING_ANSWERS,
    QUARANTINE,
    RESULT_STREAM,
    RETENTION,
    WORKERS,
    result_key,
)
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.service.marks import choose_marks
from tests.conftest import StartWorker
from tests.support.old_database import load_old_database
from tests.support.pictures import picture, png
from tests.support.redis_server import RedisServer, redis_binary
from tests.support.servers import S3Server
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

OLD_KEYS = (*(move.old for move in MOVES), *DROPPED)
SHARDS = 3


def migrate(url: str, *arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["--redis-url", url, "migrate", *arguments], catch_exceptions=False)


def answers_of(client: redis.Redis) -> Counter[str]:
    """Id → entries of the results stream."""
    entries: Any = client.xrange(RESULT_STREAM)
    return Counter(fields[b"id"].decode() for _, fields in entries)


def dump(client: redis.Redis) -> dict[bytes, Any]:
    """All keys with their values."""
    keys: Any = client.keys()
    return {key: client.dump(key) for key in keys}


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, redis_client: redis.Redis, tmp_path: Path) -> Iterator[redis.Redis]:
    """The newest server, and the oldest."""
    if request.param == "valkey":
        yield redis_client
        return
    with RedisServer(folder=tmp_path / "redis", binary=redis_binary()) as running, running.client() as client:
        yield client


def test_jobs_of_an_earlier_version_are_answered_once(
    redis_url: str, redis_client: redis.Redis, start_worker: StartWorker, s3: S3Server
) -> None:
    """Whatever state they were in; callbacks are sent, and answers that were there stay."""
    s3.put("cat.png", png(picture("熊猫").resize((48, 48))))
    ids = load_old_database(redis_client)
    before = answers_of(redis_client)
    refused = start_worker(redis_url=redis_url, ready=False)
    assert refused.wait(timeout_s=60) == ExitCode.CONFIG
    assert "redis_old_names" in refused.log_tail(lines=20)
    assert "shiwu migrate" in refused.log_tail(lines=20)
    assert answers_of(redis_client) == before
    assert migrate(redis_url).exit_code == 0
    assert migrate(redis_url).output == "nothing to move\n"
    start_worker(redis_url=redis_url, env=s3.env, callback_tasks="plain.*")
    wait_until(lambda: set(ids) <= answers_of(redis_client).keys(), timeout_s=60, what="all answers")
    wait_until(lambda: not redis_client.exists(CANVAS, CANVAS_DUE), timeout_s=60, what="all callbacks")
    wait_until(lambda: not redis_client.exists("shiwu:claims", "shiwu.bulk"), timeout_s=60, what="nothing is left")
    # The dead letter was requeued: each of its two generations has an answer.
    assert answers_of(redis_client) == dict.fromkeys(ids, 1) | {"requeued-0": 2}
    with Client(redis_url) as client:
        for job_id in ids:
            assert client.wait(job_id, timeout_s=5), job_id
    sent = [json.loads(raw)["headers"]["task"] for raw in redis_client.lrange("celery", 0, -1)]  # type: ignore[union-attr]  # not awaited
    assert sent == ["plain.note"] * 2
    # The task that follows a cancelled job in a chain.
    assert json.loads(redis_client.get(result_key("cancelled-0-next")) or "{}")["status"] == "REVOKED"  # type: ignore[arg-type]  # not awaited


def test_migration_moves_every_key_of_a_database(server: redis.Redis) -> None:
    """On both servers; a second run changes nothing, and so does a dry run before."""
    load_old_database(server)
    with pytest.raises(OldNames, match="found shiwu:parked, shiwu:suspects, shiwu:canvas, shiwu:asides") as caught:
        check_names(server)
    assert classify(caught.value) is RedisCode.OLD_NAMES
    assert server.exists(*OLD_KEYS) >= len(MOVES)  # type: ignore[operator]  # not awaited
    moved = {each.old: each.count for each in move_names(server)}
    assert moved["shiwu:parked"] == server.hlen(DELAYED_MESSAGES) == server.zcard(DELAYED) == 2
    assert moved["shiwu:suspects"] == server.llen(QUARANTINE) == 1
    assert moved["shiwu:canvas"] == server.hlen(CANVAS) == server.zcard(CANVAS_DUE) == 1
    assert moved["shiwu:asides"] == server.hlen(PENDING_ANSWERS) == 1
    assert moved["shiwu:counters copies_dropped"] == int(server.hget(COUNTERS, "duplicates_dropped") or 0) > 0  # type: ignore[arg-type]  # not awaited
    assert server.hget(RETENTION, "result_ttl_s") == b"86400"
    assert not server.exists(*OLD_KEYS)
    assert not server.hexists(COUNTERS, "copies_dropped")
    check_names(server)
    after = dump(server)
    assert list(move_names(server)) == []
    assert dump(server) == after


def test_dry_run_prints_the_same_and_changes_nothing(redis_url: str, redis_client: redis.Redis) -> None:
    """Keys that expire within seconds are the only difference, so they are removed before."""
    load_old_database(redis_client)
    redis_client.delete("shiwu:look", "shiwu:suspects:taker")
    before = dump(redis_client)
    shown = migrate(redis_url, "--dry-run")
    assert dump(redis_client) == before
    assert "shiwu:parked → shiwu:delayed:messages: 2\n" in shown.output
    assert migrate(redis_url).output == shown.output


def test_what_is_under_both_names_is_merged(server: redis.Redis) -> None:
    """As after a crash, or where a client of an earlier version cancelled: what has the new name already stays."""
    count = 2 * MAX_MOVED + 7
    server.hset("shiwu:parked", mapping={f"job-{n}": f"shiwu.bulk|old {n}" for n in range(count)})
    server.hset(DELAYED_MESSAGES, "job-3", "shiwu.bulk|new")
    server.zadd("shiwu:canvas:due", {f"job-{n}": n for n in range(count)})
    server.zadd(CANVAS_DUE, {"job-3": 7777.0})
    server.rpush("shiwu:suspects", "a", "b")
    server.rpush(QUARANTINE, "c")
    server.hset(COUNTERS, mapping={"copies_dropped": 5, "duplicates_dropped": 2})
    # A run that was interrupted after a portion.
    first = load_script(server, "move_key", package="shiwu.broker.migration")
    assert first(keys=["shiwu:parked", DELAYED_MESSAGES], args=["hash", 100])[:2] == [100, count - 100]
    found = {each.old: each for each in move_names(server)}
    assert found["shiwu:parked"].count == count - 100
    assert found["shiwu:canvas:due"].kept == 1
    assert server.hlen(DELAYED_MESSAGES) == server.zcard(CANVAS_DUE) == count
    assert server.hget(DELAYED_MESSAGES, "job-3") == b"shiwu.bulk|new"
    assert server.hget(DELAYED_MESSAGES, "job-4") == b"shiwu.bulk|old 4"
    assert server.zscore(CANVAS_DUE, "job-3") == 7777.0
    # A claim takes from the right: older ones first, in their order.
    assert server.lrange(QUARANTINE, 0, -1) == [b"c", b"a", b"b"]
    assert server.hget(COUNTERS, "duplicates_dropped") == b"7"
    assert not server.exists(*OLD_KEYS)


@pytest.mark.parametrize("wrong", ["shiwu:parked", DELAYED_MESSAGES])
def test_value_of_a_wrong_type_is_not_moved(redis_url: str, redis_client: redis.Redis, wrong: str) -> None:
    """Under either name; nothing is lost, and the command says which key it is."""
    redis_client.hset("shiwu:parked", "job", "shiwu.bulk|x")
    redis_client.delete(wrong)
    redis_client.set(wrong, "of another program")
    found = migrate(redis_url)
    assert found.exit_code == 4
    assert "redis_wrong_type" in found.stderr
    assert redis_client.get(wrong) == b"of another program"
    assert redis_client.exists("shiwu:parked")


def test_migration_is_refused_while_workers_run(redis_url: str, redis_client: redis.Redis) -> None:
    """Those with a heartbeat in the last ten seconds, of any version; `--force` moves all the same."""
    redis_client.hset("shiwu:parked", "job", "shiwu.bulk|x")
    seconds: Any = redis_client.time()
    redis_client.zadd(WORKERS, {"gpu-0": seconds[0] * 1000 - 3000, "ended": seconds[0] * 1000 - 60_000})
    refused = migrate(redis_url)
    assert refused.exit_code == 4
    assert "workers_run: expected no workers, got 1" in refused.stderr
    assert "gpu-0" in refused.stderr
    assert redis_client.exists("shiwu:parked")
    assert migrate(redis_url, "--dry-run").exit_code == 0
    assert migrate(redis_url, "--force").exit_code == 0
    assert redis_client.hgetall(DELAYED_MESSAGES) == {b"job": b"shiwu.bulk|x"}


def test_sweep_refuses_jobs_under_old_names(redis_url: str, redis_client: redis.Redis) -> None:
    """It would return their entries to no lane, and count them as none."""
    redis_client.rpush("shiwu:suspects", "shiwu.bulk|x")
    refused = CliRunner().invoke(main, ["--redis-url", redis_url, "sweep", "--once"])
    assert refused.exit_code == 64
    assert "redis_old_names" in refused.stderr
    assert migrate(redis_url).exit_code == 0
    assert CliRunner().invoke(main, ["--redis-url", redis_url, "sweep", "--once"]).exit_code == 0


def test_retention_under_its_old_name_still_counts(redis_url: str, redis_client: redis.Redis) -> None:
    """A database without jobs needs no migration: the form of its marks and the number of shards are known."""
    redis_client.hset("shiwu:limits", mapping={"result_ttl_s": 3600, "old_marks": 1, "shards": 16})
    assert choose_marks(Settings(redis_url=redis_url)).marks == "both"  # type: ignore[arg-type]  # pydantic reads texts
    check_names(redis_client)
    with pytest.raises(WrongShardCount, match="expected 16 shards"):
        keep_shard_count(redis_client, shards=8)
    keep_shard_count(redis_client, shards=16)
    assert redis_client.hgetall(RETENTION) == {b"shards": b"16"}


def test_all_shards_of_a_cluster_are_moved(cluster: ValkeyCluster) -> None:
    """Each keeps its own jobs; a worker in any shard refuses the migration."""
    url = cluster.url(shards=SHARDS)
    with Client(url) as client:
        for shard in client._redis[1:]:
            shard.hset("shiwu:parked", "job", f"shiwu.bulk|{shard.shard.prefix}")
        seconds: Any = client._redis[2].time()
        client._redis[2].zadd(WORKERS, {"gpu-0": seconds[0] * 1000})
        assert "gpu-0" in migrate(url).stderr
        client._redis[2].delete(WORKERS)
        shown = migrate(url).output
        for shard in client._redis[1:]:
            prefix = shard.shard.prefix
            assert f"{prefix}shiwu:parked → {prefix}shiwu:delayed:messages: 1\n" in shown
            assert shard.hgetall(DELAYED_MESSAGES) == {b"job": f"shiwu.bulk|{prefix}".encode()}
            assert not shard.exists("shiwu:parked")
        assert not client._redis[0].exists(DELAYED_MESSAGES)
