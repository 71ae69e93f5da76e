"""Marks of answered ids: how long they live, in which hash, and beside workers of versions that know another form."""

from __future__ import annotations

import pytest
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.marks import read_marks
from shiwu.broker.retention import Retention
from shiwu.contract import (
    ATTEMPTS,
    MARKS,
    Answer,
    Lane,
    Status,
    done_key,
    result_key,
)
from tests.support.redis_parts import answer, make_lease_queue, make_maintenance, message

TTL_MS = 300_000
MARGIN_MS = 60_000
WHOLE_MS = TTL_MS * 4 // 3 + MARGIN_MS


def store(client: redis.Redis, *, ttl_s: int = TTL_MS // 1000, old_marks: int = 0, name: str = "w") -> AnswerStore:
    """A writer of answers whose marks live for so long."""
    limits = Retention(result_ttl_s=60, done_ttl_s=ttl_s, old_marks=old_marks)
    return AnswerStore(client, token=name, retention=lambda: limits)


def write(client: redis.Redis, *ids: str, ttl_s: int = TTL_MS // 1000, name: str = "w") -> set[str]:
    """Answer these ids; returns those that were answered before."""
    entries = [AnswerEntry(answer=Answer(id=each, status=Status.TAGGED, attempts=1), id=each) for each in ids]
    return store(client, ttl_s=ttl_s, name=name).write(entries)


def place(client: redis.Redis, job_id: str) -> str:
    """The hash that has the mark of this id."""
    [key] = [key for key in MARKS if client.hexists(key, job_id)]
    return key


def test_hash_takes_marks_for_a_third_of_their_time(redis_client: redis.Redis) -> None:
    """Then the next one takes them. Each mark lives for its time, and for a third of it more at most."""
    write(redis_client, "a")
    first = place(redis_client, "a")
    assert WHOLE_MS - 5000 < redis_client.pttl(first) <= WHOLE_MS
    redis_client.pexpire(first, TTL_MS + MARGIN_MS + 30_000)
    write(redis_client, "b")
    assert place(redis_client, "b") == first
    redis_client.pexpire(first, TTL_MS + MARGIN_MS - 1)
    write(redis_client, "c")
    assert place(redis_client, "c") != first
    assert write(redis_client, "a", "b", "c") == set(), "the same writer again"
    assert store(redis_client, name="other").write(
        [
            AnswerEntry(answer=Answer(id=each, status=Status.TAGGED, attempts=1), id=each)
            for each in ("a", "b", "c", "d")
        ]
    ) == {"a", "b", "c"}


def test_four_hashes_take_turns(redis_client: redis.Redis) -> None:
    """Where the oldest one has no mark left that must live, it is emptied and used again."""
    used = []
    for number in range(9):
        write(redis_client, f"id{number}")
        used.append(place(redis_client, f"id{number}"))
        for key in MARKS:
            # More than a third: a server may do a whole turn of this loop within one millisecond.
            left_ms = redis_client.pttl(key) - TTL_MS // 3 - 1
            if left_ms > 0:
                redis_client.pexpire(key, left_ms)
    assert [len(set(used[at : at + 4])) for at in range(6)] == [4] * 6
    assert sum(redis_client.hlen(key) for key in MARKS) == 4
    assert read_marks(redis_client, ["id4", "id5", "id8"])[0] is None


def test_maintenance_removes_hashes_with_old_marks(redis_client: redis.Redis) -> None:
    """Before the server has to delete all of their fields in one step."""
    write(redis_client, "a")
    make_maintenance(redis_client).run_once()
    assert redis_client.exists(*MARKS) == 1
    redis_client.pexpire(place(redis_client, "a"), MARGIN_MS - 1)
    make_maintenance(redis_client).run_once()
    assert redis_client.exists(*MARKS) == 0


@pytest.mark.parametrize("ttls_s", [(300, 90_000), (90_000, 300)])
def test_writers_with_other_times_keep_their_promises(redis_client: redis.Redis, ttls_s: tuple[int, int]) -> None:
    """Each mark lives for its own time at least, and no hash is used for longer than its writers need."""
    for number in range(8):
        for ttl_s in ttls_s:
            name = f"{ttl_s}.{number}"
            write(redis_client, name, ttl_s=ttl_s)
            assert redis_client.pttl(place(redis_client, name)) >= ttl_s * 1000
        for key in MARKS:
            if redis_client.pttl(key) > 100_000:
                redis_client.pexpire(key, redis_client.pttl(key) - 100_000)
    assert all(redis_client.pttl(key) <= 90_000_000 * 4 // 3 + MARGIN_MS for key in MARKS)


def test_hash_without_an_end_gets_one(redis_client: redis.Redis) -> None:
    """As after a restore by another program."""
    for key in MARKS:
        redis_client.hset(key, "x", "w:1")
    write(redis_client, "a")
    assert redis_client.pttl(place(redis_client, "a")) > TTL_MS


def test_id_that_comes_twice_in_one_write_is_answered_once(redis_client: redis.Redis) -> None:
    """Its second answer is another attempt's."""
    first = AnswerEntry(answer=Answer(id="a", status=Status.TAGGED, attempts=1), id="a")
    second = AnswerEntry(answer=Answer(id="a", status=Status.TAGGED, attempts=2), id="a")
    assert store(redis_client).write([first, second]) == {"a"}
    assert read_marks(redis_client, ["a"]) == [b"w:1"]


# ------------------------------------------------------------------------------------- earlier versions
@pytest.mark.parametrize("old_marks", [0, 1])
def test_marks_are_kept_for_earlier_versions_too(redis_client: redis.Redis, old_marks: int) -> None:
    """With `both`: they look for a key of each id before they answer it."""
    entry = AnswerEntry(answer=Answer(id="a", status=Status.TAGGED, attempts=0), id="a")
    store(redis_client, old_marks=old_marks).write([entry])
    assert place(redis_client, "a")
    expected = b"w:0" if old_marks else None
    assert redis_client.get(done_key("a")) == expected
    if old_marks:
        assert TTL_MS // 1000 - 10 < redis_client.ttl(done_key("a")) <= TTL_MS // 1000


@pytest.mark.parametrize("has_result", [True, False])
def test_answer_of_an_earlier_version_is_the_only_one(redis_client: redis.Redis, *, has_result: bool) -> None:
    """A claim cannot see its mark, so the answer is discarded; the caller of the copy finds a result."""
    redis_client.set(done_key("a"), "old.worker:1")
    if has_result:
        redis_client.set(result_key("a"), "kept")
    redis_client.lpush(Lane.BULK.queue, message("a"))
    [job] = make_lease_queue(redis_client, "w").claim(5).jobs
    assert store(redis_client, old_marks=1).write([answer(job)]) == {"a"}
    assert redis_client.get(done_key("a")) == b"old.worker:1"
    assert redis_client.exists(result_key("a")) == 1
    assert (redis_client.get(result_key("a")) == b"kept") is has_result


def test_job_that_an_earlier_version_requeued_is_answered(redis_client: redis.Redis) -> None:
    """It deleted the mark in the form that it knows, and started a generation."""
    write(redis_client, "a")
    redis_client.hset(ATTEMPTS, "a", "0/1:0")
    redis_client.lpush(Lane.BULK.queue, message("a"))
    [job] = make_lease_queue(redis_client, "w").claim(5).jobs
    assert job.generation == 1
    assert store(redis_client, old_marks=1).write([answer(job)]) == set()
    assert redis_client.hget(place(redis_client, "a"), "a") == b"w:1#1"
    assert redis_client.get(done_key("a")) == b"w:1#1"
