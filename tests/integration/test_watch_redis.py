"""`shiwu watch` on MinIO's Redis target in both forms, with a real Valkey and real watcher processes."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu.broker.script_loader import load_script
from shiwu.contract import RESULT_STREAM, WATCH_UNREAD, Lane
from shiwu.watch.events import ObjectStored
from shiwu.watch.keys import taken_key, watchers_key
from shiwu.watch.sources.redis_hash import RedisHash
from shiwu.watch.sources.redis_list import RedisList
from shiwu.watch.unread import MAX_UNREAD
from tests.support.fault_proxy import FaultProxy
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue
from tests.support.waiting import wait_until
from tests.support.watch import (
    KEY,
    access_event,
    drain,
    lines,
    push,
    record,
    run_watch,
    source,
    total,
    waiting_jobs,
    watch_process,
    write_rules,
)

DATA = Path(__file__).parents[1] / "unit" / "watch" / "data"
ODD_KEYS = ["a b.jpg", "a+b.jpg", "a%2Bb.jpg", "a%b.jpg", "熊猫 100%.jpg", "é/ü#?.jpg", "a//b.jpg", "x'\"&.jpg"]


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The file of rules."""
    return write_rules(tmp_path)


def test_access_events_become_jobs(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """Any key, in the lane of its rule; nothing is left, also of the watcher's own keys but its name."""
    push(redis_client, *ODD_KEYS)
    push(redis_client, "urgent/a.txt")
    push(redis_client, "b.txt")
    push(redis_client, "gone.jpg", name="ObjectRemoved:Delete")
    [line] = drain(redis_url, rules, "--name", "w")
    expected = {"messages": 11, "enqueued": 9, "no_rule": 1, "removed": 1}
    assert {name: count for name, count in line.items() if name != "seconds"} == expected
    assert [image for _, image in waiting_jobs(redis_client)] == [f"s3://photos/{key}" for key in ODD_KEYS]
    assert [image for _, image in waiting_jobs(redis_client, Lane.INTERACTIVE)] == ["s3://photos/urgent/a.txt"]
    assert redis_client.exists(KEY, taken_key(KEY, "w")) == 0
    assert redis_client.zrange(watchers_key(KEY), 0, -1) == [b"w"]
    assert drain(redis_url, rules) == []


def test_recorded_access_event_becomes_a_job(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """With the id that its object, ETag and sequencer give."""
    redis_client.rpush(KEY, (DATA / "minio_access.json").read_bytes())
    drain(redis_url, rules)
    etag, sequencer = "b1946ac92492d2347c6235b4d2611184", "18F5B4E2C0A1B2C3"
    stored = ObjectStored(bucket="photos", key="in/red flower + 猫.jpg", etag=etag, sequencer=sequencer)
    assert waiting_jobs(redis_client) == [(stored.id, "s3://photos/in/red flower + 猫.jpg")]


def test_duplicates_are_one_job_each(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """10,000 messages about ten events, in two runs, get ten answers."""
    keys = [f"{number}.jpg" for number in range(10)]
    for _ in range(2):
        push(redis_client, *(keys * 500))
        counted = drain(redis_url, rules, "--portion", "1000")
        assert (total(counted, "messages"), total(counted, "enqueued"), total(counted, "duplicate")) == (5000, 10, 4990)
    jobs = waiting_jobs(redis_client)
    assert len(jobs) == 20
    assert len(set(jobs)) == 10
    queue, store = make_lease_queue(redis_client, "w"), make_answer_store(redis_client, "w")
    while claimed := queue.claim(100).jobs:
        store.write([answer(job) for job in claimed])
    streamed: Any = redis_client.xrange(RESULT_STREAM)
    assert sorted(fields[b"id"].decode() for _, fields in streamed) == sorted({job_id for job_id, _ in jobs})


def test_unreadable_messages_are_kept(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """The newest thousand, with the reason; the others of the portion become jobs."""
    redis_client.rpush(KEY, *(f"{number}: no JSON" for number in range(MAX_UNREAD + 1)), b"\xff" + b"x" * 5000)
    push(redis_client, "a.jpg")
    counted = drain(redis_url, rules)
    assert (total(counted, "unread"), total(counted, "enqueued")) == (MAX_UNREAD + 2, 1)
    assert redis_client.llen(WATCH_UNREAD) == MAX_UNREAD
    kept = lines(run_watch(redis_url, "--unread").stdout)
    assert len(kept) == MAX_UNREAD
    newest, second = kept[:2]
    assert second["body"] == f"{MAX_UNREAD}: no JSON"
    assert second["reason"] == "expected JSON, or JSON in base64"
    assert second["source"] == f"{redis_url}?key={KEY}"
    assert newest["body"] == "\\xff" + "x" * 4092
    assert newest["length"] == 5004


def test_full_lane_is_waited_for(redis_url: str, redis_client: redis.Redis, tmp_path: Path, rules: Path) -> None:
    """SIGTERM ends the wait with 0, and gives the portion back in its order."""
    events = [access_event(f"{number}.jpg") for number in range(20)]
    redis_client.rpush(KEY, *events)
    arguments = ("--max-waiting", "5", "--portion", "10", "--name", "w")
    with watch_process(redis_url, source(redis_url), *arguments, folder=tmp_path) as watch:
        wait_until(lambda: len(waiting_jobs(redis_client)) == 5, timeout_s=30, what="a full lane")
        redis_client.delete(Lane.BULK.queue)
        wait_until(lambda: len(waiting_jobs(redis_client)) == 5, timeout_s=30, what="the rest of the portion")
        images = [image for _, image in waiting_jobs(redis_client)]
        assert images == [f"s3://photos/{number}.jpg" for number in range(5, 10)]
        wait_until(lambda: redis_client.llen(KEY) == 0, timeout_s=30, what="the second portion is taken")
        assert redis_client.llen(taken_key(KEY, "w")) == 10
        assert "which holds 5 of 5" in watch.log_text()
        assert watch.stop() == 0
    left: Any = redis_client.lrange(KEY, 0, -1)
    assert left == events[10:]
    assert redis_client.exists(taken_key(KEY, "w")) == 0


def test_full_lane_does_not_hold_up_the_other(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, rules: Path
) -> None:
    """In one portion; what cannot be read is kept meanwhile, and nothing is enqueued twice by this watcher."""
    push(redis_client, "a.jpg")
    drain(redis_url, rules)
    push(redis_client, "b.jpg", "urgent/c.txt")
    redis_client.rpush(KEY, "no JSON")
    with watch_process(redis_url, source(redis_url), "--max-waiting", "1", folder=tmp_path) as watch:
        wait_until(lambda: waiting_jobs(redis_client, Lane.INTERACTIVE), timeout_s=30, what="the urgent job")
        wait_until(lambda: watch.log_text().count("waiting"), timeout_s=30, what="a line about the full lane")
        redis_client.delete(Lane.BULK.queue)
        wait_until(lambda: lines(watch.log_text()), timeout_s=30, what="the line of the portion")
        assert watch.stop() == 0
    assert [image for _, image in waiting_jobs(redis_client)] == ["s3://photos/b.jpg"]
    assert [image for _, image in waiting_jobs(redis_client, Lane.INTERACTIVE)] == ["s3://photos/urgent/c.txt"]
    assert redis_client.llen(WATCH_UNREAD) == 1


def test_kill_before_the_removal_loses_nothing(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, rules: Path
) -> None:
    """The jobs are enqueued and the source hangs: the next watcher of this name enqueues the same ids."""
    push(redis_client, "a.jpg", "b.jpg")
    with FaultProxy(redis_url) as events, FaultProxy(redis_url) as lanes:
        watch = watch_process(lanes.url, source(events.url), "--name", "w", folder=tmp_path)
        push(redis_client, "first.jpg")
        with watch:
            wait_until(lambda: len(waiting_jobs(redis_client)) == 3, timeout_s=30, what="a watcher at work")
            # Removed too, or the messages awaited below may be these three.
            wait_until(lambda: not redis_client.exists(KEY, taken_key(KEY, "w")), timeout_s=30, what="their removal")
            lanes.refuse()
            push(redis_client, "c.jpg", "d.jpg")
            # The watcher has them, too: the reply that brings them might be in the proxy that holds up all replies now.
            wait_until(lambda: "redis_away" in watch.log_text(), timeout_s=60, what="a line about taken messages")
            events.black_hole()
            lanes.heal()
            wait_until(lambda: len(waiting_jobs(redis_client)) > 3, timeout_s=60, what="jobs of taken messages")
            watch.kill()
    assert redis_client.llen(taken_key(KEY, "w")) > 0
    drain(redis_url, rules, "--name", "w")
    assert redis_client.exists(KEY, taken_key(KEY, "w")) == 0
    jobs = waiting_jobs(redis_client)
    assert len(jobs) > 5
    assert {image for _, image in jobs} == {f"s3://photos/{name}.jpg" for name in ("a", "b", "first", "c", "d")}
    assert len({job_id for job_id, _ in jobs}) == 5


@pytest.mark.long
def test_kills_at_random_lose_nothing(redis_url: str, redis_client: redis.Redis, tmp_path: Path, rules: Path) -> None:
    """2,000 events, eight SIGKILLs: every event is a job, and nothing stays in a list of a watcher."""
    keys = [f"{number}.jpg" for number in range(2000)]
    chance = random.Random(7)  # where in each portion
    for number, start in enumerate(range(0, 2000, 250)):
        push(redis_client, *keys[start : start + 250])
        with watch_process(
            redis_url, source(redis_url), "--name", "w", "--portion", "20", folder=tmp_path, name=f"watch-{number}"
        ) as watch:
            before = redis_client.llen(KEY)
            goal = chance.randrange(before)
            wait_until(lambda goal=goal: redis_client.llen(KEY) <= goal, timeout_s=30, what="some are taken", every_s=0)
            watch.kill()
    drain(redis_url, rules, "--name", "w")
    assert redis_client.exists(KEY, taken_key(KEY, "w")) == 0
    jobs = waiting_jobs(redis_client)
    assert {image for _, image in jobs} == {f"s3://photos/{key}" for key in keys}
    assert len({job_id for job_id, _ in jobs}) == 2000


def make_list(client: redis.Redis, watcher: str, *, takeover_s: float = 60.0) -> RedisList:
    """A source in this process."""
    return RedisList(client, key=KEY, name="events", watcher=watcher, takeover_s=takeover_s)


def test_what_a_crashed_watcher_took_is_returned(redis_client: redis.Redis) -> None:
    """To a watcher of the same name immediately, to others once it was not seen for long; in the same order."""
    push(redis_client, "a.jpg", "b.jpg", "c.jpg")
    lost = make_list(redis_client, "lost").take(2, wait_s=0)
    assert [raw for raw, _ in make_list(redis_client, "lost").take(5, wait_s=0)] == [raw for raw, _ in lost]
    other = make_list(redis_client, "other")
    assert [raw for raw, _ in other.take(5, wait_s=0)] == [access_event("c.jpg")]
    later = make_list(redis_client, "later", takeover_s=0.1)
    taken: list[bytes] = []

    def has_all() -> bool:
        taken.extend(raw for raw, _ in later.take(5, wait_s=0))
        return len(taken) == 3

    wait_until(has_all, timeout_s=10, what="what the others took")
    assert set(taken) == {access_event(f"{name}.jpg") for name in "abc"}
    assert taken.index(access_event("a.jpg")) < taken.index(access_event("b.jpg"))
    assert redis_client.zrange(watchers_key(KEY), 0, -1) == [b"later"]
    assert redis_client.exists(taken_key(KEY, "lost"), taken_key(KEY, "other")) == 0


def test_watcher_that_goes_on_keeps_what_it_took(redis_client: redis.Redis) -> None:
    """While its jobs must wait for longer than others wait for it."""
    push(redis_client, "a.jpg")
    slow = make_list(redis_client, "slow", takeover_s=0.4)
    taken = slow.take(1, wait_s=0)
    other = make_list(redis_client, "other", takeover_s=0.4)
    began: Any = redis_client.time()

    def has_passed() -> bool:
        slow.keep(taken)
        assert other.take(1, wait_s=0) == []
        return bool(redis_client.time()[0] > began[0] + 1)

    wait_until(has_passed, timeout_s=10)
    slow.done(taken)
    assert redis_client.exists(KEY, taken_key(KEY, "slow"), taken_key(KEY, "other")) == 0


def test_watcher_that_is_seen_again_keeps_what_it_took(redis_client: redis.Redis) -> None:
    """It comes back between the search for crashed watchers and the return of their messages."""
    redis_client.rpush(taken_key(KEY, "slow"), access_event("a.jpg"))
    redis_client.zadd(watchers_key(KEY), {"slow": 1000})
    give_back = load_script(redis_client, "return_taken", package="shiwu.watch")
    keys = [KEY, taken_key(KEY, "slow"), watchers_key(KEY)]
    assert give_back(keys=keys, args=["slow", 999, 10]) == 0
    assert give_back(keys=keys, args=["gone", 1000, 10]) == 0
    assert redis_client.llen(taken_key(KEY, "slow")) == 1
    assert give_back(keys=keys, args=["slow", 1000, 10]) == 1
    assert redis_client.exists(taken_key(KEY, "slow"), watchers_key(KEY)) == 0


@pytest.mark.parametrize("count", [2, 3])
def test_more_left_over_than_one_portion_is_taken(redis_client: redis.Redis, count: int) -> None:
    """Portion by portion, before new messages."""
    events = [access_event(f"{number}.jpg") for number in range(5)]
    redis_client.rpush(taken_key(KEY, "w"), *events)
    push(redis_client, "new.jpg")
    again = make_list(redis_client, "w")
    found = []
    while taken := again.take(count, wait_s=0):
        found += [raw for raw, _ in taken]
        again.done(taken)
    assert found == [*events, access_event("new.jpg")]


# ------------------------------------------------------------------------------------ namespace
def test_namespace_fields_become_jobs(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """And are deleted; what cannot be read is kept and deleted too."""
    redis_client.hset(KEY, "photos/in/100%+.jpg", (DATA / "minio_namespace.json").read_bytes())
    redis_client.hset(KEY, mapping={f"photos/{key}": _fields(key) for key in ODD_KEYS})
    redis_client.hset(KEY, "photos/broken.jpg", "{}")
    counted = drain(redis_url, rules)
    assert (total(counted, "enqueued"), total(counted, "unread")) == (len(ODD_KEYS) + 1, 1)
    images = {image for _, image in waiting_jobs(redis_client)}
    assert images == {f"s3://photos/{key}" for key in [*ODD_KEYS, "in/100%+.jpg"]}
    assert redis_client.exists(KEY) == 0


def _fields(key: str, *, number: int = 1) -> str:
    return json.dumps({"Records": [record(key, number=number)]})


def test_newer_event_of_an_object_is_not_deleted(redis_client: redis.Redis) -> None:
    """MinIO may overwrite a field, or delete it, while its job is enqueued."""
    redis_client.hset(KEY, mapping={f"photos/{name}": _fields(name) for name in ("same", "newer", "gone")})
    fields = RedisHash(redis_client, key=KEY, name="events", stop=threading.Event())
    taken = fields.take(10, wait_s=0)
    assert len(taken) == 3
    redis_client.hset(KEY, "photos/newer", _fields("newer", number=2))
    redis_client.hdel(KEY, "photos/gone")
    fields.done(taken)
    assert redis_client.hgetall(KEY) == {b"photos/newer": _fields("newer", number=2).encode()}


def test_large_hash_is_read_in_portions(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """And each field once."""
    names = [f"{number}.jpg" for number in range(3000)]
    redis_client.hset(KEY, mapping={f"photos/{name}": _fields(name) for name in names})
    counted = drain(redis_url, rules, "--portion", "100")
    assert total(counted, "enqueued") == 3000
    assert max(line["messages"] for line in counted) == 100
    assert len(waiting_jobs(redis_client)) == 3000


# ------------------------------------------------------------------------------------ errors
def wait_for_images(client: redis.Redis, *names: str) -> None:
    """Wait until the lane has jobs for exactly these. A reply that was cut makes a second message with the same id."""
    expected = {f"s3://photos/{name}.jpg" for name in names}
    wait_until(lambda: {image for _, image in waiting_jobs(client)} == expected, timeout_s=60, what=f"{names}")


def test_redis_that_comes_back_is_waited_for(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, rules: Path
) -> None:
    """That of the lanes and that of the events; each is reported."""
    with (
        FaultProxy(redis_url) as events,
        FaultProxy(redis_url) as lanes,
        watch_process(lanes.url, source(events.url), folder=tmp_path) as watch,
    ):
        push(redis_client, "a.jpg")
        wait_for_images(redis_client, "a")
        lanes.refuse()
        push(redis_client, "b.jpg")
        wait_until(lambda: "redis_away" in watch.log_text(), timeout_s=60, what="a line about the lanes")
        lanes.heal()
        wait_for_images(redis_client, "a", "b")
        away = watch.log_text().count("redis_away")
        events.refuse()
        wait_until(lambda: watch.log_text().count("redis_away") > away, timeout_s=60, what="a line about the events")
        push(redis_client, "c.jpg")
        events.heal()
        wait_for_images(redis_client, "a", "b", "c")
        wait_until(lambda: redis_client.keys(f"{KEY}*") == [watchers_key(KEY).encode()], timeout_s=10)
        assert watch.stop() == 0
