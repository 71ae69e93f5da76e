"""How dead letters are selected and read, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shiwu import RequestError
from shiwu.broker.answers import dead_message
from shiwu.client import dead_letters as module
from shiwu.client.dead_letters import CHUNK_SIZE, DeadFilter, DeadLetter
from shiwu.client.results import TagResult
from shiwu.contract import (
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    MAX_MESSAGE_BYTES,
    Answer,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    Stage,
    Status,
)
from tests.support.redis_parts import DeadLetters

NOW_MS = 100_000.0
FULL: dict[str, Any] = {
    "status": Status.REJECTED,
    "worker": "w1",
    "error": ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut", stage=Stage.DECODE),
    "image": ImageInfo(reference="s3://b/cat.jpg"),
}
MATCHING: dict[str, str] = {
    "code": "picture_broken",
    "stage": "decode",
    "status": "rejected",
    "worker": "w1",
    "image": "cat",
}


class Parts:
    """Dead letters of a server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[bytes, float]] = []
        self.values: dict[str, dict[str, bytes]] = {DEAD_ANSWERS: {}, DEAD_MESSAGES: {}}
        self.ranges: list[Any] = []
        self.loads: list[int] = []
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr(module, "call_repeatable_script", lambda name, **call: lambda _: self._run(name, call))
        client: Any = SimpleNamespace(
            zrevrangebyscore=self._range,
            zscore=lambda _, job_id: dict(self.found).get(job_id.encode()),
            pipeline=self._pipe,
            time=lambda: (NOW_MS // 1000, 0),
        )
        self.letters = DeadLetters(client)

    def _range(self, _: str, newest: Any, oldest: Any, *, withscores: bool) -> Any:
        self.ranges.append((newest, oldest))
        assert withscores
        return self.found

    def _pipe(self, *, transaction: bool) -> Any:
        assert transaction
        asked: list[Any] = []
        self.loads.append(0)

        def read(key: str, ids: list[str]) -> None:
            self.loads[-1] = len(ids)
            asked.append([self.values[key].get(job_id) for job_id in ids])

        return SimpleNamespace(hmget=read, execute=lambda: asked)

    def _run(self, name: str, call: dict[str, Any]) -> Any:
        # The names of the lanes come first.
        ids = call["args"][sum(len(lane.keys) for lane in Lane) :] if name == "requeue" else call["args"]
        self.calls.append((name, len(ids)))
        return [job_id.encode() for job_id in ids] if name == "requeue" else len(ids)

    def add(self, job_id: str, *, key: str = "shiwu.bulk", raw: bytes = b"raw", **fields: Any) -> None:
        """A dead letter that is older than those before."""
        self.found.append((job_id.encode(), NOW_MS - len(self.found)))
        given: dict[str, Any] = {"status": Status.FAILED} | fields
        self.values[DEAD_ANSWERS][job_id] = Answer(id=job_id, **given).to_json()
        self.values[DEAD_MESSAGES][job_id] = dead_message(key, raw)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """No dead letters."""
    return Parts(monkeypatch)


def letter(**fields: Any) -> DeadLetter:
    """A dead letter with this answer."""
    return DeadLetter("a", 0.0, TagResult(id="a", **({"status": Status.FAILED} | fields)), b"", None)


@pytest.mark.parametrize("name", MATCHING)
def test_filter_needs_each_of_its_fields(name: str) -> None:
    """One that is missing in the answer does not match; one that is not set matches all."""
    assert DeadFilter().admits(letter())
    assert DeadFilter(**MATCHING).admits(letter(**FULL))
    assert DeadFilter(**{name: MATCHING[name]}).admits(letter(**FULL))
    assert not DeadFilter(**{name: MATCHING[name]}).admits(letter())
    assert not DeadFilter(**(MATCHING | {name: "another"})).admits(letter(**FULL))


@pytest.mark.parametrize("name", ["older_s", "newer_s"])
def test_age_of_a_filter_is_a_number_of_seconds(name: str) -> None:
    """Where it is set."""
    assert getattr(DeadFilter(**{name: 0.0}), name) == 0.0
    with pytest.raises(RequestError, match=name):
        DeadFilter(**{name: -1.0})


def test_ages_are_compared_by_the_server(parts: Parts) -> None:
    """In ms since 1970; without them all letters are read."""
    list(parts.letters.read())
    list(parts.letters.read(DeadFilter(older_s=10.0)))
    list(parts.letters.read(DeadFilter(newer_s=20.0, older_s=0.0)))
    assert parts.ranges == [("+inf", "-inf"), (90_000.0, "-inf"), (100_000.0, 80_000.0)]


@pytest.mark.parametrize(("limit", "shown"), [(None, 4), (0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_limit_counts_letters_that_match(parts: Parts, limit: int | None, shown: int) -> None:
    """Newest first."""
    for number in range(8):
        parts.add(f"j{number}", worker="w1" if number % 2 else "w2")
    found = [each.id for each in parts.letters.read(DeadFilter(worker="w1"), limit=limit)]
    assert found == ["j1", "j3", "j5", "j7"][:shown]


def test_letters_are_read_in_portions(parts: Parts) -> None:
    """One that is removed meanwhile is left out."""
    for number in range(CHUNK_SIZE + 2):
        parts.add(f"j{number}")
    del parts.values[DEAD_ANSWERS]["j0"], parts.values[DEAD_MESSAGES]["j1"]
    assert len(list(parts.letters.read())) == CHUNK_SIZE
    assert parts.loads == [CHUNK_SIZE, 2]


def test_letter_has_message_lane_and_time(parts: Parts) -> None:
    """Of one that was too large, its size and digest; a lane of another version is not known."""
    parts.add("a", raw=b"abc")
    parts.add("b", key="shiwu.other", raw=b"x" * (MAX_MESSAGE_BYTES + 1))
    first, second = parts.letters.show("a"), parts.letters.show("b")
    assert first is not None
    assert second is not None
    assert (first.id, first.message, first.size, first.sha256, first.lane) == ("a", b"abc", 3, None, Lane.BULK)
    assert (first.died_ms, first.result.id) == (NOW_MS, "a")
    assert (second.size, second.lane) == (MAX_MESSAGE_BYTES + 1, None)
    assert second.sha256 is not None
    assert parts.letters.show("c") is None
    del parts.values[DEAD_ANSWERS]["a"]
    assert parts.letters.show("a") is None


def test_many_letters_are_requeued_and_dropped_in_portions(parts: Parts) -> None:
    """The results of all portions count."""
    ids = [f"j{number}" for number in range(CHUNK_SIZE + 3)]
    assert parts.letters.requeue(iter(ids)) == ids
    assert parts.letters.drop(iter(ids)) == len(ids)
    assert parts.letters.requeue([]) == []
    assert parts.letters.drop([]) == 0
    assert parts.calls == [("requeue", CHUNK_SIZE), ("requeue", 3), ("drop", CHUNK_SIZE), ("drop", 3)]
