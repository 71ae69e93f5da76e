"""The results stream is bounded, and never forgets what a group has not seen without saying so."""

from __future__ import annotations

import redis

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import COUNTERS, DEAD, DEAD_ANSWERS, DEAD_MESSAGES, RESULT_STREAM, Answer, Status
from tests.support.redis_parts import make_answer_store, make_maintenance

LENGTH = 1000


def fill(client: redis.Redis, count: int, *, prefix: str = "j") -> None:
    """Write so many answers."""
    entries = [
        AnswerEntry(answer=Answer(id=f"{prefix}{n}", status=Status.TAGGED), id=f"{prefix}{n}", ignore_result=True)
        for n in range(count)
    ]
    make_answer_store(client, "w").write(entries)


def test_trim_without_groups_reports_nothing(redis_client: redis.Redis) -> None:
    """No consumer group waits for the entries."""
    fill(redis_client, LENGTH + 300)
    assert make_maintenance(redis_client, stream_length=LENGTH).trim() == {}
    assert redis_client.xlen(RESULT_STREAM) == LENGTH
    assert redis_client.hget(COUNTERS, "results_dropped") is None


def test_trim_reports_unacknowledged_entries(redis_client: redis.Redis) -> None:
    """Entries that were never delivered, and delivered ones without acknowledgement, for each group."""
    redis_client.xgroup_create(RESULT_STREAM, "quick", id="0", mkstream=True)
    redis_client.xgroup_create(RESULT_STREAM, "slow", id="0")
    redis_client.xgroup_create(RESULT_STREAM, "stuck", id="0")
    fill(redis_client, LENGTH + 300)
    [[_, entries]] = redis_client.xreadgroup("quick", "c", {RESULT_STREAM: ">"}, count=5000)
    redis_client.xack(RESULT_STREAM, "quick", *[entry_id for entry_id, _ in entries])
    redis_client.xreadgroup("slow", "c", {RESULT_STREAM: ">"}, count=100)
    [[_, seen]] = redis_client.xreadgroup("stuck", "c", {RESULT_STREAM: ">"}, count=1300)
    redis_client.xack(RESULT_STREAM, "stuck", *[entry_id for entry_id, _ in seen[::2]])
    maintenance = make_maintenance(redis_client, stream_length=LENGTH)
    assert maintenance.trim() == {"slow": 300, "stuck": 150}
    assert redis_client.xlen(RESULT_STREAM) == LENGTH
    assert redis_client.hget(COUNTERS, "results_dropped") == b"450"
    assert maintenance.trim() == {}


def test_trim_of_a_short_stream_drops_nothing(redis_client: redis.Redis) -> None:
    """Nothing is dropped below the limit."""
    fill(redis_client, 10)
    assert make_maintenance(redis_client, stream_length=LENGTH).trim() == {}
    assert redis_client.xlen(RESULT_STREAM) == 10


def fill_large(client: redis.Redis, count: int, *, is_dead: bool = False) -> None:
    """Write so many answers of 50 kB."""
    answers = [Answer(id=f"{n}", status=Status.FAILED, attempts=1, metadata="x" * 50_000) for n in range(count)]
    entries = [AnswerEntry(answer=answer, id=answer.id, message=b"shiwu.bulk|x", is_dead=is_dead) for answer in answers]
    make_answer_store(client, "w").write(entries)


def test_stream_of_large_answers_keeps_to_its_bytes(redis_client: redis.Redis) -> None:
    """However few the entries are; the newest are kept, and a group that loses some is named."""
    redis_client.xgroup_create(RESULT_STREAM, "slow", id="0", mkstream=True)
    maintenance = make_maintenance(redis_client, stream_bytes=2**20)
    maintenance.trim_if_long(maintenance.run_once())
    fill_large(redis_client, 100)
    lost = maintenance.trim_if_long(maintenance.run_once())
    assert 0.5 * 2**20 < (redis_client.memory_usage(RESULT_STREAM, samples=0) or 0) <= 2**20
    left = redis_client.xlen(RESULT_STREAM)
    assert lost == {"slow": 100 - left}
    [(_, newest)] = redis_client.xrevrange(RESULT_STREAM, count=1)
    assert newest[b"id"] == b"99"
    assert maintenance.trim_if_long(maintenance.run_once()) == {}


def test_newest_answer_stays_in_a_stream_of_any_budget(redis_client: redis.Redis) -> None:
    """A consumer must be able to see an answer that alone exceeds the budget."""
    maintenance = make_maintenance(redis_client, stream_bytes=1000)
    fill_large(redis_client, 3)
    for _ in range(2):
        maintenance.trim_if_long(maintenance.run_once())
        assert redis_client.xlen(RESULT_STREAM) == 1


def test_entries_that_a_consumer_deletes_take_no_budget(redis_client: redis.Redis) -> None:
    """The count of the scripts does not know of XDEL, so the stream is measured before anything is dropped."""
    maintenance = make_maintenance(redis_client, stream_bytes=2**20)
    maintenance.trim_if_long(maintenance.run_once())
    fill_large(redis_client, 100)
    entries = redis_client.xrange(RESULT_STREAM)
    redis_client.xdel(RESULT_STREAM, *[entry_id for entry_id, _ in entries[:-5]])
    assert maintenance.trim_if_long(maintenance.run_once()) == {}
    assert redis_client.xlen(RESULT_STREAM) == 5
    assert int(redis_client.hget(COUNTERS, "results_bytes") or 0) < 2**20


def test_large_dead_letters_keep_to_their_bytes(redis_client: redis.Redis) -> None:
    """The oldest go, and not those that are left after an operator removed others."""
    maintenance = make_maintenance(redis_client, dead_bytes=2**20)
    maintenance.trim_if_long(maintenance.run_once())
    fill_large(redis_client, 40, is_dead=True)
    maintenance.trim_if_long(maintenance.run_once())
    left = redis_client.zcard(DEAD)
    assert 10 < left < 21
    assert redis_client.zcount(DEAD, "-inf", "+inf") == redis_client.hlen(DEAD_ANSWERS)
    assert redis_client.hlen(DEAD_ANSWERS) == redis_client.hlen(DEAD_MESSAGES) == left
    assert redis_client.hget(COUNTERS, "dead_dropped") == b"%d" % (40 - left)
    redis_client.hset(COUNTERS, "dead_bytes", 10**9)
    maintenance.trim_if_long(maintenance.run_once())
    assert redis_client.zcard(DEAD) == left
