"""The results stream is bounded, and never forgets what a group has not seen without saying so."""

from __future__ import annotations

import redis

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import COUNTERS, RESULT_STREAM, Answer, Status
from tests.support.redis_parts import make_committer, make_maintenance

LENGTH = 1000


def fill(client: redis.Redis, count: int, *, prefix: str = "j") -> None:
    """Write so many answers."""
    entries = [
        AnswerEntry(answer=Answer(id=f"{prefix}{n}", status=Status.TAGGED), id=f"{prefix}{n}", ignore_result=True)
        for n in range(count)
    ]
    make_committer(client, "w").write(entries)


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
