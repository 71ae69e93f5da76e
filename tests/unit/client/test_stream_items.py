"""Items of the results stream, and pauses while Redis is unavailable, without a server."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.broker import steps
from shiwu.broker.steps import Steps, run
from shiwu.client import stream_items as module
from shiwu.client.stream_items import EntryReader, Outage, StreamItem, UnreadableItem, log_unreadable
from shiwu.contract import RESULT_STREAM, Answer, Status
from tests.support.clock import Clock

AWAY = redis.ConnectionError("away")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, by a clock that only they move."""
    made: list[float] = []
    clock = Clock()

    def wait(seconds: float) -> None:
        made.append(seconds)
        clock.now_s += seconds

    monkeypatch.setattr(steps, "Event", lambda: SimpleNamespace(wait=wait))
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return made


def wait(outage: Outage, error: Exception = AWAY) -> None:
    """Make the pause after an error."""

    def pause() -> Steps[None]:
        yield outage.pause(error)

    no_client: Any = None
    run(no_client, pause())


class Acks:
    """A client that keeps what is acknowledged, after these errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[Any] = []

    def xack(self, *asked: Any) -> None:
        """Keep it."""
        self.asked.append(asked)
        if self.errors:
            raise self.errors.pop(0)


def entry(number: int, **fields: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """An entry of the stream."""
    given = {name.encode(): value for name, value in fields.items()}
    return f"{number}-0".encode(), given or {b"answer": Answer(id=f"j{number}", status=Status.TAGGED).to_json()}


def test_outage_has_growing_pauses_and_two_log_lines(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """One at its begin, one at its end; the next one begins again."""
    outage = Outage(away_s=None)
    with caplog.at_level(logging.WARNING, logger="shiwu"):
        outage.end()
        assert (outage.is_on, len(caplog.records)) == (False, 0)
        for _ in range(3):
            wait(outage)
        assert (outage.is_on, len(pauses), len(caplog.records)) == (True, 3, 1)
        assert 0 < pauses[0] < pauses[2]
        outage.end()
        outage.end()
        assert (outage.is_on, len(caplog.records)) == (False, 2)
        assert f"after {sum(pauses):.1f} s" in caplog.text
        wait(outage)
    assert pauses[3] < pauses[2]
    assert len(caplog.records) == 3


def test_outage_logs_each_reason_once(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """As of a primary that is gone, and of its replica that has taken over and lacks a replica of its own."""
    outage = Outage(away_s=None, shard=3)
    with caplog.at_level(logging.WARNING, logger="shiwu"):
        for _ in range(2):
            wait(outage)
            wait(outage, redis.ResponseError("NOREPLICAS Not enough good replicas to write."))
    assert [record.message.split(": ")[:2] for record in caplog.records] == [
        ["shard 3", "redis_away"],
        ["shard 3", "redis_not_replicated"],
    ]
    assert len(pauses) == 4


def test_outage_ends_after_its_time(pauses: list[float]) -> None:
    """Measured from its first error; 0 allows none."""
    with pytest.raises(redis.ConnectionError):
        wait(Outage(away_s=0.0))
    assert pauses == []
    outage = Outage(away_s=5.0)

    def wait_often() -> None:
        for _ in range(1000):
            wait(outage)

    with pytest.raises(redis.ConnectionError):
        wait_often()
    assert 5.0 <= sum(pauses) < 15.0


def test_error_that_does_not_pass_is_raised(pauses: list[float]) -> None:
    """A wrong password stays wrong."""
    with pytest.raises(redis.AuthenticationError):
        wait(Outage(away_s=None), redis.AuthenticationError("wrong"))
    assert pauses == []


def test_acknowledgement_is_repeated_while_redis_is_away(pauses: list[float]) -> None:
    """As long as its caller allows; by default not at all."""
    result: Any = None
    acks: Any = Acks(AWAY, OSError("x"), AWAY)
    StreamItem("1-0", result, acks, "g").ack(away_s=60.0)
    assert acks.asked == [(RESULT_STREAM, "g", "1-0")] * 4
    assert len(pauses) == 3
    once: Any = Acks(AWAY)
    with pytest.raises(redis.ConnectionError):
        StreamItem("1-0", result, once, "g").ack()
    assert len(pauses) == 3
    UnreadableItem("2-0", {}, "x", acks, "g").ack()
    assert acks.asked[-1] == (RESULT_STREAM, "g", "2-0")


def test_entries_become_items(caplog: pytest.LogCaptureFixture) -> None:
    """Trimmed ones are acknowledged; each one that cannot be read is reported once, and stays pending."""
    acks: Any = Acks()
    reported: list[tuple[str, Any, str]] = []
    reader = EntryReader(group="g", on_unreadable=lambda *item: reported.append(item))
    entries = [entry(1), (b"2-0", {}), entry(3, other=b"x"), entry(4, answer=b"junk"), entry(5)]
    for _ in range(2):
        items = run(acks, reader.read_steps(entries))
        assert [(item.id, item.result.id) for item in items] == [("1-0", "j1"), ("5-0", "j5")]
    assert acks.asked == [(RESULT_STREAM, "g", b"2-0")] * 2
    assert [entry_id for entry_id, _, _ in reported] == ["3-0", "4-0"]
    assert reported[0][1:] == ({b"other": b"x"}, "expected a field `answer`, got none")
    with caplog.at_level(logging.WARNING, logger="shiwu"):
        log_unreadable(UnreadableItem(*reported[0], acks, "g"))
    assert "entry 3-0" in caplog.text


def test_memory_of_reported_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten, and would be reported again."""
    monkeypatch.setattr(module, "MAX_REPORTED", 3)
    acks: Any = Acks()
    reported: list[str] = []
    reader = EntryReader(group="g", on_unreadable=lambda entry_id, *_: reported.append(entry_id))
    for number in (1, 2, 3, 1, 4, 2, 3, 4, 1):
        run(acks, reader.read_steps([entry(number, other=b"x")]))
    assert reported == ["1-0", "2-0", "3-0", "4-0", "1-0"]


@pytest.mark.parametrize(("written", "generation"), [(None, 0), (b"2", 2), (b"x", 0), (b"-1", 0)])
def test_item_has_the_generation_of_its_answer(written: bytes | None, generation: int) -> None:
    """Entries of older workers have none."""
    raw = Answer(id="j", status=Status.TAGGED).to_json()
    fields = {"answer": raw} | ({} if written is None else {"generation": written})
    acks: Any = Acks()
    reader = EntryReader(group="g", on_unreadable=pytest.fail)
    [item] = run(acks, reader.read_steps([entry(1, **fields)]))
    assert (item.result.id, item.generation) == ("j", generation)
