"""A key of a wrong type: no script loses a job, and maintenance restores the service by itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import redis
from structlog.testing import capture_logs

from shiwu.broker.answers import AnswerEntry
from shiwu.broker.known_labels import KnownLabels, KnownLabelStore
from shiwu.broker.queue_stats import read_state
from shiwu.broker.script_loader import load_script
from shiwu.contract import (
    ATTEMPTS,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEAD_MESSAGES,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    FOREIGN,
    KEY_TYPES,
    LAST_CLAIM,
    LEASES,
    MARKS,
    QUARANTINE,
    QUARANTINE_OWNER,
    RESULT_STREAM,
    REVOKED,
    Answer,
    Lane,
    Status,
    done_key,
    result_key,
)
from shiwu_worker.celery_worker.revoke import Revoker
from shiwu_worker.jobs.job import Release
from shiwu_worker.pipeline.heartbeat import Heartbeat
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import LoadMeter, Progress
from tests.support.observers import RecordingObserver
from tests.support.redis_parts import (
    DeadLetters,
    answer,
    make_answer_store,
    make_lease_queue,
    make_maintenance,
    message,
)
from tests.support.waiting import wait_until

LANE_KEYS = [key for lane in Lane for key in lane.keys]
OF_ONE_ID = [prefix + name for prefix in (done_key(""), result_key("")) for name in ("held", "waiting")]
ALL_KEYS = [*KEY_TYPES, Lane.INTERACTIVE.queue, Lane.BULK.queue, *OF_ONE_ID]
BACKUP = "backup"


def fill(client: redis.Redis) -> None:
    """One job in every state: waiting, held by `w`, of a crashed worker, delayed, quarantined, dead, with callbacks."""
    client.flushall()
    queue = make_lease_queue(client, "w")
    for name in ("dead", "delayed", "due"):
        client.lpush("shiwu.bulk", message(name))
        [job] = queue.claim(1).jobs
        if name == "dead":
            failed = Answer(id=name, status=Status.FAILED, attempts=1)
            raw = job.key.encode() + b"|" + job.raw
            make_answer_store(client, "w").write([AnswerEntry(answer=failed, id=name, message=raw, is_dead=True)])
        else:
            queue.release([Release(name, delay_s=60, counts=True)])
    client.zadd(DELAYED, {"due": 1.0})
    client.lpush("shiwu.bulk", message("crashed"))
    make_lease_queue(client, "crashed", lease_s=0.0).claim(1)
    client.lpush("shiwu.bulk", *map(message, ("held", "held-too")))
    assert len(queue.claim(2).jobs) == 2
    client.rpush(QUARANTINE, b"shiwu.bulk|" + message("suspected"))
    client.lpush("shiwu.bulk", message("waiting"))
    client.lpush("shiwu.interactive", message("waiting-too"))
    client.hset(CANVAS, "linked", b"2|{}shiwu.bulk|" + message("linked"))
    client.zadd(CANVAS_DUE, {"linked": 1.0})


def jobs(client: redis.Redis, *, broken: str) -> set[str]:
    """Ids that are in some place, counting what stood in the broken key before."""

    def hash_keys(key: str) -> set[str]:
        place = BACKUP if key == broken else key
        return {name.decode() for name in client.hkeys(place)} if client.type(place) == b"hash" else set()

    found = hash_keys(CLAIMS) | hash_keys(DELAYED_MESSAGES) | hash_keys(DEAD_MESSAGES) | hash_keys(CANVAS)
    for key in (*LANE_KEYS, QUARANTINE):
        place = BACKUP if key == broken else key
        if client.type(place) == b"list":
            found |= {json.loads(raw[raw.index(b"{") :])["headers"]["id"] for raw in client.lrange(place, 0, -1)}
    return found.union(*map(hash_keys, MARKS))


def dump(client: redis.Redis) -> dict[bytes, bytes | None]:
    """All values but last claims, which expire, and what revoke notes before a step that may fail."""
    keys: list[bytes] = client.keys()
    return {key: client.dump(key) for key in keys if not key.startswith((REVOKED.encode(), LAST_CLAIM.encode()))}


def claim(client: redis.Redis) -> None:
    make_lease_queue(client, "other").claim(10)


def renew(client: redis.Redis) -> None:
    make_lease_queue(client, "w").renew(["held", "held-too"])


def release(client: redis.Redis) -> None:
    make_lease_queue(client, "w").release(
        [Release("held", counts=True, ending="x|fetch"), Release("held-too", delay_s=9, counts=True, ending="x|fetch")]
    )


def commit(client: redis.Redis) -> None:
    entries = [
        AnswerEntry(id=name, answer=Answer(id=name, status=Status.TAGGED, attempts=1)) for name in ("held", "held-too")
    ]
    make_answer_store(client, "w").write(entries)


def fail(client: redis.Redis) -> None:
    failed = Answer(id="held", status=Status.FAILED, attempts=1)
    make_answer_store(client, "w").write(
        [
            AnswerEntry(
                answer=failed, id="held", message=b"shiwu.bulk|" + message("held"), is_dead=True, has_callbacks=True
            )
        ]
    )


def cancel(client: redis.Redis) -> None:
    cancelled = [Answer(id=name, status=Status.CANCELLED, attempts=0) for name in ("held", "waiting", "delayed")]
    make_answer_store(client, "c").write(
        [AnswerEntry(answer=each, id=each.id, is_from_outside=True) for each in cancelled]
    )


def maintain(client: redis.Redis) -> None:
    make_maintenance(client).run_once()


def trim(client: redis.Redis) -> None:
    make_maintenance(client, stream_length=0).trim()


def trim_dead(client: redis.Redis) -> None:
    make_maintenance(client).trim_dead(bytes_over=1)


def requeue(client: redis.Redis) -> None:
    DeadLetters(client).requeue(["dead"])


def drop(client: redis.Redis) -> None:
    DeadLetters(client).drop(["none"])


def revoke(client: redis.Redis) -> None:
    Revoker(client, make_answer_store(client, "r")).revoke(["held", "delayed", "foreign"])


def take_late(client: redis.Redis) -> None:
    take = load_script(client, "take_late")
    take(
        keys=[CLAIMS, LEASES, ATTEMPTS, "shiwu.bulk"],
        args=["sweep", 15_000, "shiwu.bulk", "waiting", client.lindex("shiwu.bulk", -1) or b""],
    )


def take_callbacks(client: redis.Redis) -> None:
    load_script(client, "take_callbacks")(keys=[CANVAS, CANVAS_DUE], args=[30_000, 10])


def note_labels(client: redis.Redis) -> None:
    KnownLabelStore(client).note([KnownLabels(digest="d", labels=("a",))])


SCRIPTS: list[Callable[[redis.Redis], None]] = [
    claim,
    renew,
    release,
    commit,
    fail,
    cancel,
    maintain,
    trim,
    trim_dead,
    requeue,
    drop,
    revoke,
    take_late,
    take_callbacks,
    note_labels,
]


@pytest.mark.parametrize("run", SCRIPTS, ids=[run.__name__ for run in SCRIPTS])
def test_wrong_type_loses_no_job(redis_client: redis.Redis, run: Callable[[redis.Redis], None]) -> None:
    """A script that fails changes nothing. Then maintenance moves the value, and the script succeeds."""
    for key in ALL_KEYS:
        fill(redis_client)
        if redis_client.exists(key):
            redis_client.rename(key, BACKUP)
        redis_client.sadd(key, "foreign")
        before = jobs(redis_client, broken=key)
        content = dump(redis_client)
        try:
            run(redis_client)
        except redis.ResponseError:
            assert dump(redis_client) == content, key
        assert jobs(redis_client, broken=key) >= before, key
        maintenance = make_maintenance(redis_client)
        moved = [value.key for value in maintenance.move_foreign()]
        assert moved == [key] * (key not in OF_ONE_ID), key
        if moved and redis_client.exists(BACKUP):
            redis_client.rename(BACKUP, key)
        run(redis_client)
        assert jobs(redis_client, broken="") >= before, key
        maintenance.run_once()
        assert redis_client.hlen(CLAIMS) == redis_client.zcard(LEASES), key
        assert redis_client.hlen(DELAYED_MESSAGES) == redis_client.zcard(DELAYED), key


def test_foreign_value_is_named_counted_and_kept(redis_client: redis.Redis) -> None:
    """The moved value can be looked at for a week."""
    redis_client.lpush(DEADLINES, "x")
    [value] = make_maintenance(redis_client).move_foreign()
    assert (value.key, value.type, value.moved_to.startswith(f"{FOREIGN}{DEADLINES}:")) == (DEADLINES, "list", True)
    assert redis_client.lrange(value.moved_to, 0, -1) == [b"x"]
    assert 0 < redis_client.ttl(value.moved_to) <= 7 * 86_400
    assert redis_client.hget(COUNTERS, "foreign_moved") == b"1"


def test_commit_goes_on_beside_foreign_deadlines(redis_client: redis.Redis) -> None:
    """Producers may write to this key, so no answer waits until it is repaired."""
    redis_client.lpush("shiwu.bulk", message("job"))
    [job] = make_lease_queue(redis_client, "w").claim(1).jobs
    redis_client.lpush(DEADLINES, "x")
    assert make_answer_store(redis_client, "w").write([answer(job)]) == set()


def test_commit_survives_counters_that_are_no_numbers(redis_client: redis.Redis) -> None:
    """They are set anew, and readers do not fail meanwhile."""
    redis_client.hset(
        COUNTERS, mapping={"answered": "many", "reaped": 2**63 - 1, "duplicates_dropped": "x", b"\xff": "1"}
    )
    assert read_state(redis_client).counters["answered"] == 0
    redis_client.lpush("shiwu.bulk", message("job"), message("job"))
    [job] = make_lease_queue(redis_client, "w", lease_s=0.0).claim(2).jobs
    wait_until(lambda: make_maintenance(redis_client).run_once().reaped, timeout_s=5)
    assert make_answer_store(redis_client, "w").write([answer(job)]) == set()
    assert read_state(redis_client).counters["answered"] == 1


def test_full_stream_is_moved_and_answers_go_on(redis_client: redis.Redis) -> None:
    """An entry with the largest id ends a stream for Redis."""
    redis_client.xadd(RESULT_STREAM, {"a": "b"}, id="18446744073709551615-18446744073709551615")
    redis_client.lpush("shiwu.bulk", message("one"), message("two"))
    claimed = make_lease_queue(redis_client, "w").claim(2).jobs
    assert make_answer_store(redis_client, "w").write([answer(job) for job in claimed]) == set()
    assert [fields[b"id"] for _, fields in redis_client.xrange(RESULT_STREAM)] == [b"one", b"two"]
    assert len(redis_client.keys(f"{FOREIGN}{RESULT_STREAM}:*")) == 1


def test_jobs_of_a_foreign_lane_do_not_hold_up_others(redis_client: redis.Redis) -> None:
    """500 records whose lane takes no message stand before one that can go back, in leases and in delayed jobs."""
    lane = Lane.INTERACTIVE.queue
    redis_client.set(lane, "a string")
    for number in range(500):
        redis_client.hset(CLAIMS, f"c{number}", f"gone|1|{lane}|{number}")
        redis_client.hset(DELAYED_MESSAGES, f"d{number}", f"{lane}|{number}")
    redis_client.zadd(LEASES, {f"c{number}": 1.0 for number in range(500)})
    redis_client.zadd(DELAYED, {f"d{number}": 1.0 for number in range(500)})
    redis_client.hset(CLAIMS, "claimed", b"gone|1|shiwu.bulk|" + message("claimed"))
    redis_client.hset(DELAYED_MESSAGES, "delayed", b"shiwu.bulk|" + message("delayed"))
    redis_client.zadd(LEASES, {"claimed": 2.0})
    redis_client.zadd(DELAYED, {"delayed": 2.0})
    maintenance = make_maintenance(redis_client)
    first, second = maintenance.run_once(), maintenance.run_once()
    assert (first.reaped, first.promoted, second.reaped, second.promoted) == (0, 0, 1, 1)


def test_records_of_an_unknown_lane_go_to_bulk(redis_client: redis.Redis) -> None:
    """As a later version may write them: reaped, delayed, released, requeued and quarantined ones."""
    queue = make_lease_queue(redis_client, "w")
    redis_client.hset(CLAIMS, "reaped", b"gone|1|other|" + message("reaped"))
    redis_client.hset(CLAIMS, "released", b"w|1|other|" + message("released"))
    redis_client.zadd(LEASES, {"reaped": 1.0, "released": 9e15})
    redis_client.hset(DELAYED_MESSAGES, "delayed", b"other|" + message("delayed"))
    redis_client.zadd(DELAYED, {"delayed": 1.0})
    redis_client.hset(DEAD_MESSAGES, "dead", b"other|" + message("dead"))
    make_maintenance(redis_client).run_once()
    queue.release([Release("released")])
    assert DeadLetters(redis_client).requeue(["dead"]) == ["dead"]
    assert redis_client.llen(Lane.BULK.queue) == 4
    redis_client.rpush(QUARANTINE, b"other|" + message("suspected"))
    assert [job.key for job in queue.claim(9).jobs] == [Lane.BULK.queue]
    assert not redis_client.exists("other")


def test_claim_and_delay_without_their_index_come_back(redis_client: redis.Redis) -> None:
    """The sorted sets are rebuilt from the messages."""
    redis_client.hset(CLAIMS, "claimed", b"gone|1|shiwu.bulk|" + message("claimed"))
    redis_client.hset(DELAYED_MESSAGES, "delayed", b"shiwu.bulk|" + message("delayed"))
    maintenance = make_maintenance(redis_client)
    assert maintenance.run_once().promoted == 1
    assert redis_client.zrange(LEASES, 0, -1) == [b"claimed"]


def test_clock_set_back_bounds_owner_and_reservations(redis_client: redis.Redis) -> None:
    """Like leases: the quarantine's owner to ten minutes, reservations of callbacks to one."""
    redis_client.set(QUARANTINE_OWNER, "w", px=86_400_000)
    redis_client.zadd(CANVAS_DUE, {"job": 9e15})
    make_maintenance(redis_client).run_once()
    seconds, _ = redis_client.time()
    assert 590_000 < redis_client.pttl(QUARANTINE_OWNER) <= 600_000
    assert 50 < (redis_client.zscore(CANVAS_DUE, "job") or 0) / 1000 - seconds < 62
    redis_client.set(QUARANTINE_OWNER, "nobody")
    make_maintenance(redis_client).run_once()
    assert 0 < redis_client.pttl(QUARANTINE_OWNER) <= 600_000


def test_heartbeat_moves_foreign_values_first(redis_client: redis.Redis) -> None:
    """A worker repairs its own leases key, and says what it moved; Redis counts as available."""
    redis_client.lpush("shiwu.bulk", message("job"))
    redis_client.set(LEASES, "x")
    observer = RecordingObserver()
    heartbeat = Heartbeat(
        make_lease_queue(redis_client, "w"),
        make_maintenance(redis_client, "w"),
        lease_s=0.6,
        in_flight=["job"],
        stuck_s=lambda: 60.0,
        progress=Progress(),
        meter=LoadMeter(loader_threads=1),
        on_quarantine=lambda: None,
        observer=observer,
        backoff=RedisBackoff("heartbeat"),
        on_fatal=pytest.fail,
    )
    with capture_logs() as logs:
        heartbeat.start()
        try:
            wait_until(lambda: observer.foreign and observer.renewed, timeout_s=10)
        finally:
            heartbeat.close()
    [line] = [line for line in logs if line["event"] == "foreign_value_moved"]
    assert (line["key"], line["type"], line["log_level"]) == (LEASES, "string", "error")
    assert (observer.foreign, set(observer.redis)) == ([1], {True})
