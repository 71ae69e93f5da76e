"""Lists that look like lanes and that no worker reads: `shiwu status` and `--check` show them."""

from __future__ import annotations

import json

import pytest
import redis
from celery import Celery
from click.testing import CliRunner

from shiwu import Client
from shiwu.cli import main
from shiwu.contract import WORKERS, Lane
from shiwu_worker.commands import check
from shiwu_worker.config.settings import Settings
from tests.support.servers import Valkey


def send(url: str, **options: object) -> None:
    """Enqueue by a Celery client with transport options of its own."""
    app = Celery("odd", broker=url, set_as_current=False)
    app.conf.broker_transport_options = options
    app.send_task("shiwu.tag", args=["s3://b/k"], queue="shiwu.bulk", priority=5)
    app.close()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"global_keyprefix": "prod:"}, "prod:shiwu.bulk\x06\x163"),
        ({"sep": ":"}, "shiwu.bulk:3"),
        ({"priority_steps": list(range(10))}, "shiwu.bulk\x06\x165"),
    ],
)
def test_stray_lane_of_other_options_is_found(
    redis_url: str, redis_client: redis.Redis, options: dict[str, object], key: str
) -> None:
    """Each of kombu's options that moves a message; lanes themselves are never named."""
    send(redis_url)
    with Client(redis_url) as client:
        assert client.stray_lanes().found == ()
        send(redis_url, **options)
        stray = client.stray_lanes()
        assert stray.is_complete
        assert [(lane.key, lane.database, lane.messages) for lane in stray.found] == [(key, 0, 1)]
        shown = CliRunner().invoke(main, ["--redis-url", redis_url, "status"])
        assert "not read by any worker" in shown.output
        as_json = CliRunner().invoke(main, ["--redis-url", redis_url, "status", "--json"])
        assert json.loads(as_json.output)["stray_lanes"] == [{"key": key, "database": 0, "messages": 1}]
    report = check._check_redis(Settings(redis_url=redis_url))  # type: ignore[arg-type]  # pydantic reads the text
    assert any("no worker reads them" in warning for warning in report.warnings)


def test_stray_lane_in_another_database_is_found(redis_url: str, valkey_session: Valkey) -> None:
    """Where no worker runs; the connection is as before."""
    other = redis_url.replace("/0", "/3")
    with redis.Redis.from_url(other) as near, Client(redis_url) as client:
        near.lpush(Lane.INTERACTIVE.queue, "{}")
        try:
            assert [(lane.key, lane.database) for lane in client.stray_lanes().found] == [(Lane.INTERACTIVE.queue, 3)]
            client.enqueue("s3://b/k", lane="interactive")
            assert near.llen(Lane.INTERACTIVE.queue) == 1, "the client is still in its own database"
            near.zadd(WORKERS, {"theirs": 1.0})
            assert client.stray_lanes().found == ()
        finally:
            near.flushdb()


def test_refused_search_for_stray_lanes_is_incomplete(redis_url: str, redis_client: redis.Redis) -> None:
    """A user without SCAN and INFO gets an empty result that is marked as incomplete."""
    redis_client.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "&*", "+@all", "-scan", "-info")
    try:
        with Client(redis_url.replace("redis://", "redis://poor:pw@")) as client:
            assert (client.stray_lanes().found, client.stray_lanes().is_complete) == ((), False)
    finally:
        redis_client.execute_command("ACL", "DELUSER", "poor")
    redis_client.lpush("a|shiwu.bulk", "x")
    for number in range(25):
        redis_client.lpush(f"{number}:shiwu.bulk", "x")
    with Client(redis_url) as client:
        stray = client.stray_lanes()
    assert (len(stray.found), stray.is_complete) == (20, False)
