"""No script touches a key that its caller did not declare, so all its keys can be in one slot of a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import redis

from shiwu.backfill.state import BackfillState, Change
from shiwu.broker.migration import move_names
from shiwu.contract import COUNTERS, DELAYED_MESSAGES, RESULT_STREAM
from shiwu.hooks.delivery_queue import DeliveryQueue, NewDelivery, Payload, QueueOptions
from shiwu.hooks.shards import SharedHealth
from shiwu.watch.sources.redis_hash import RedisHash
from shiwu.watch.sources.redis_list import RedisList, taken_key, watchers_key
from tests.protocol.explorer import explore
from tests.protocol.simulated_redis import CLOCK_KEY, TIME_CALL, SimulatedRedis
from tests.support.declared_keys import SCRIPTS, check_declared_keys

EXTENSIONS = ("backfill/", "hooks/", "migration/", "watch/")
LIMIT_S = 120.0
"""Until each script of the core has run, which takes a few seconds."""
OPTIONS = QueueOptions(lease_s=60.0, alone_after=3, alone_every_s=60.0, max_age_s=3600.0, max_dead=100)
GROUP = "hooks"


@pytest.fixture
def client(redis_url: str) -> Iterator[SimulatedRedis]:
    """A client with the explorer's clock."""
    with SimulatedRedis.from_url(redis_url, socket_timeout=30) as connected:
        yield connected


def test_scripts_of_jobs_touch_only_declared_keys(client: SimulatedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random schedules of claims, answers, releases, requeues, sweeps and crashes, until every script has run."""
    changes = [(TIME_CALL, "explorer_time()")]
    ran = check_declared_keys(monkeypatch, changes=changes, allowed=[CLOCK_KEY])
    wanted = {name for name in SCRIPTS if not name.startswith(EXTENSIONS)}
    end_s, seed, least = time.monotonic() + LIMIT_S, 20261130, 40
    while (wanted - ran or least > 0) and time.monotonic() < end_s:
        explore(client, seed=seed, schedules=20, until_s=end_s)
        seed, least = seed + 1, least - 20
    assert wanted - ran == set(), "every script ran"


def test_scripts_of_extensions_touch_only_declared_keys(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries of webhooks, bucket events, the state of a backfill, and the move of an old database."""
    ran = check_declared_keys(monkeypatch)
    _deliver(redis_client)
    _watch(redis_client)
    redis_client.hset("shiwu:parked", "job", "x")
    redis_client.hset(DELAYED_MESSAGES, "job", "y")
    redis_client.hset(COUNTERS, "copies_dropped", 1)
    assert len(list(move_names(redis_client))) == 2
    state = BackfillState(redis_client, "b")
    state.take("owner", now_ms=1.0)
    state.write(Change({"phase": "running"}, {"read": 1}, opened=[("a", b"1|{}")], closed=["c"]))
    assert ran == {name for name in SCRIPTS if name.startswith(EXTENSIONS)}, "every script ran"


def _deliver(client: redis.Redis) -> None:
    client.xgroup_create(RESULT_STREAM, GROUP, id="0", mkstream=True)
    for _ in range(2):
        client.xadd(RESULT_STREAM, {"id": "k", "answer": "{}"})
    [[_, entries]] = client.xreadgroup(GROUP, "me", {RESULT_STREAM: ">"}, count=2)
    queue = DeliveryQueue(client, OPTIONS)
    made = [
        NewDelivery(endpoint=endpoint, id=f"k{number}", payload=Payload(1), body=b"{}", dead_reason=reason)
        for number, (endpoint, reason) in enumerate([("a", ""), ("a", ""), ("b", "refused")])
    ]
    assert queue.add(made, group=GROUP, entry_ids=[entry_id.decode() for entry_id, _ in entries]) == 3
    first, second = queue.take("a", count=5)
    queue.retry(first, reason="503", delay_s=0.0)
    queue.give_up(second, reason="410")
    SharedHealth([client, client]).copy("a", source=0)
    assert queue.revive([("a", second.id), ("b", "k2")]) == 2


def _watch(client: redis.Redis) -> None:
    key = "bucketevents"
    client.hset(key, "b/k", "{}")
    fields = RedisHash(client, key=key, name="events", stop=threading.Event())
    fields.done(fields.take(5, wait_s=0))
    assert not client.exists(key)
    client.rpush(taken_key(key, "gone"), "{}")
    client.zadd(watchers_key(key), {"gone": 1.0})
    assert len(RedisList(client, key=key, name="events", watcher="w").take(5, wait_s=0)) == 1


@pytest.mark.parametrize("call", ["call", "pcall"])
def test_undeclared_key_is_found(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A script that makes the name of a key, also where it ignores the error."""
    text = f"return redis.{call}('GET', KEYS[1] .. ARGV[1])"
    monkeypatch.setitem(SCRIPTS, "made/script", text)
    check_declared_keys(monkeypatch)
    script = redis_client.register_script(text)
    assert script(keys=["a"], args=[""]) is None
    with pytest.raises(redis.ResponseError, match=r"made/script touches a key that is not in KEYS: GET ab"):
        script(keys=["a"], args=["b"])
