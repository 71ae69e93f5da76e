"""Sweeps over waiting messages whose deadline has passed, without a server."""

from __future__ import annotations

import base64
import json
import random
from datetime import UTC
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.broker import expiry as module
from shiwu.broker.answers import AnswerEntry
from shiwu.broker.expiry import CHUNK_SIZE, MAX_CHECKED, Expiry
from shiwu.broker.message_writer import build_message
from shiwu.contract import QUARANTINE, ErrorCode, Lane, Request, Status

NOW_MS = 5000.0
KEY = Lane.BULK.queue


def message(job_id: str, *, metadata: Any = None, **times: float) -> bytes:
    """A message of our own client."""
    request = Request(image="https://h/p?x=secret", metadata=metadata)
    return build_message(request, job_id=job_id, lane=Lane.BULK, **times)


class Parts:
    """Lists and answers of a server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lists: dict[str, list[bytes]] = {}
        self.reads: list[int] = []
        self.marks: set[str] = set()
        self.pending: set[str] = set()
        self.answered: set[str] = set()
        self.written: list[AnswerEntry] = []
        self.tokens: list[str | None] = []
        self.not_taken: set[str] = set()
        self.index: list[tuple[str, Any]] = []
        self.script_args: list[list[Any]] = []
        monkeypatch.setattr(module, "load_repeatable_script", lambda _, name: getattr(self, f"_{name}"))
        monkeypatch.setattr(module, "read_marks", lambda _, ids: [self._known(job_id, self.marks) for job_id in ids])
        monkeypatch.setattr(module, "server_time_ms", lambda _: NOW_MS)
        client: Any = SimpleNamespace(
            lrange=self._lrange,
            llen=lambda key: len(self.lists.get(key, [])),
            hmget=lambda _, ids: [self._known(job_id, self.pending) for job_id in ids],
            zadd=lambda _, later, xx: self.index.append(("later" if xx else "new", later)),
            zrem=lambda _, *members: self.index.append(("removed", members)),
        )
        store: Any = SimpleNamespace(write=self._write)
        self.expiry = Expiry(client, store, token="t")

    def _lrange(self, key: str, first: int, last: int) -> list[bytes]:
        values = self.lists.get(key, [])
        found = values[max(0, len(values) + first) : max(0, len(values) + last + 1)]
        self.reads.append(len(found))
        return found

    @staticmethod
    def _known(job_id: str, known: set[str]) -> bytes | None:
        return b"x" if job_id in known else None

    def _write(self, entries: list[AnswerEntry], *, token: str | None = None) -> set[str]:
        self.written += entries
        self.tokens.append(token)
        again = {entry.id for entry in entries} & self.answered
        self.answered |= {entry.id for entry in entries}
        return again

    def _take_late(self, *, keys: list[str], args: list[Any]) -> list[int]:
        self.script_args.append(args)
        reply: list[int] = []
        for number, at in enumerate(range(3, len(args), 2), start=1):
            if args[at] not in self.not_taken:
                self.lists[keys[-1]].remove(args[at + 1])
                reply += [number, 40 + number]
        return reply

    def _drop_answered(self, *, keys: list[str], args: list[Any]) -> int:
        for at in range(1, len(args), 2):
            self.lists[keys[0]].remove(args[at + 1])
        return len(args) // 2

    def sweep(self, *, portion: int = 10, limit: int = MAX_CHECKED) -> tuple[int, int]:
        """One sweep over the lanes."""
        return self.expiry.expire_waiting(portion=portion, limit=limit, zone=UTC)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A sweep without messages."""
    return Parts(monkeypatch)


def lane(*kinds: str) -> list[bytes]:
    """A lane with messages of these kinds, the oldest first."""
    times: dict[str, dict[str, float]] = {"late": {"expires_ms": NOW_MS}, "soon": {"expires_ms": NOW_MS + 1}}
    made = [b"junk" if kind == "junk" else message(f"{kind}{n}", **times.get(kind, {})) for n, kind in enumerate(kinds)]
    return made[::-1]


@pytest.mark.parametrize("portion", [1, 2, 3, 5, 50])
def test_sweep_answers_expired_messages_of_a_lane(parts: Parts, portion: int) -> None:
    """Whatever lies between them; the others stay in their order."""
    parts.lists[KEY] = lane("late", "never", "late", "junk", "late", "late", "soon", "late")
    left = [raw for raw in parts.lists[KEY] if b'"late' not in raw]
    assert parts.sweep(portion=portion) == (5, 0)
    assert parts.lists[KEY] == left
    assert [entry.id for entry in parts.written] == ["late0", "late2", "late4", "late5", "late7"]
    assert max(parts.reads) <= portion
    assert parts.sweep(portion=portion) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_sweeps_reach_every_message_of_a_long_lane(parts: Parts, seed: int) -> None:
    """Each checks so many and goes on there; it reports how many it did not check."""
    chance = random.Random(seed)
    kinds = chance.choices(["late", "never", "junk"], [2, 5, 1], k=60)
    parts.lists[KEY] = lane(*kinds)
    portion, limit = chance.choice([(4, 8), (5, 10), (7, 7), (3, 15)])
    expired = 0
    for number in range(20):
        before = len(parts.lists[KEY])
        parts.reads.clear()
        found, unchecked = parts.sweep(portion=portion, limit=limit)
        checked = sum(parts.reads)
        assert checked < limit + portion
        expired += found
        if number == 0:
            assert unchecked == before - checked
        if "late" not in b"".join(parts.lists[KEY]).decode(errors="replace"):
            break
    assert expired == kinds.count("late")
    assert len(parts.lists[KEY]) == len(kinds) - expired


def test_lane_that_became_shorter_is_checked_from_its_head(parts: Parts) -> None:
    """In the same sweep, where the place that was stored lies behind its end."""
    parts.lists[KEY] = lane(*["never"] * 20)
    assert parts.sweep(portion=5, limit=10) == (0, 10)
    parts.lists[KEY] = lane("late", "never", "late")
    assert parts.sweep(portion=5, limit=10) == (2, 0)
    assert len(parts.lists[KEY]) == 1


def test_place_is_kept_for_each_lane(parts: Parts) -> None:
    """Messages of the other lanes are checked by the same sweep."""
    other = Lane.INTERACTIVE.queue
    parts.lists = {KEY: lane(*["never"] * 15, "late"), other: lane("late", "never")}
    assert parts.sweep(portion=5, limit=10) == (1, 6)
    assert parts.sweep(portion=5, limit=10) == (1, 10)
    assert parts.sweep(portion=5, limit=10) == (0, 5)


def test_message_that_was_taken_meanwhile_is_not_answered(parts: Parts) -> None:
    """Another process has it; each answer has the generation of its own message, and a token of the call."""
    parts.lists[KEY] = lane("late", "late", "late")
    parts.not_taken = {"late1"}
    parts.answered = {"late2"}
    assert parts.sweep() == (1, 0)
    assert [(entry.id, entry.generation) for entry in parts.written] == [("late0", 41), ("late2", 43)]
    assert len(parts.lists[KEY]) == 1
    assert parts.script_args[0][:3] == ["t", 15_000, KEY]
    assert str(parts.tokens[0]).startswith("t.lane.")
    parts.lists[KEY] = lane("late")
    parts.sweep()
    assert parts.tokens[1] != parts.tokens[0]


def test_message_of_an_answered_job_leaves_its_lane(parts: Parts) -> None:
    """One that was cancelled while it waited: it counts as no expired message, and hides none."""
    parts.lists[KEY] = lane("never", "late", "never")
    parts.pending = {"never0"}
    assert parts.sweep(portion=1) == (1, 0)
    assert len(parts.lists[KEY]) == 1


def test_expired_message_with_callbacks_keeps_them(parts: Parts) -> None:
    """Its record names the lane; one without callbacks is not kept."""
    plain = message("a", expires_ms=0.0)
    outer = json.loads(message("b", expires_ms=0.0))
    args, kwargs, _ = json.loads(base64.b64decode(outer["body"]))
    outer["body"] = base64.b64encode(json.dumps([args, kwargs, {"callbacks": [{"task": "t"}]}]).encode()).decode()
    raw = json.dumps(outer).encode()
    parts.lists[KEY] = [raw, plain]
    parts.sweep()
    first, second = parts.written
    assert (first.message, first.has_callbacks) == (b"", False)
    assert (second.message, second.has_callbacks) == (KEY.encode() + b"|" + raw, True)


def test_expired_answer_has_image_and_metadata(parts: Parts) -> None:
    """As far as the request can be read, and without the query of the reference."""
    parts.lists[KEY] = [message("a", metadata={"n": 1}, expires_ms=0.0)]
    parts.lists[KEY].append(parts.lists[KEY][0].replace(b'"a"', b'"b"'))
    parts.sweep()
    entry = parts.written[-1]
    assert (entry.answer.status, entry.answer.attempts, entry.answer.metadata) == (Status.EXPIRED, 0, {"n": 1})
    assert entry.answer.error is not None
    assert entry.answer.error.code is ErrorCode.EXPIRED
    assert entry.answer.image is not None
    assert entry.answer.image.reference == "https://h/p"
    assert not entry.is_from_outside


def test_due_messages_are_answered_or_corrected(parts: Parts) -> None:
    """A claim with another name keeps it; entries without a deadline go, and later ones get their time."""
    records = {
        b"now": b"k|" + message("now", answer_by_ms=NOW_MS),
        b"~claim": b"k|" + message("other", expires_ms=NOW_MS - 1),
        b"later": b"k|" + message("later", answer_by_ms=NOW_MS + 1),
        b"expires": b"k|" + message("expires", expires_ms=NOW_MS + 1),
        b"junk": b"k|junk",
        b"\xff": b"k|" + message("bytes", answer_by_ms=NOW_MS),
    }
    parts.answered = {"other"}
    assert parts.expiry.answer_due(records, now_ms=NOW_MS, zone=UTC) == 1
    assert [(entry.id, entry.claim) for entry in parts.written] == [("now", ""), ("other", "~claim")]
    assert all(entry.is_from_outside for entry in parts.written)
    assert parts.index == [("later", {b"later": NOW_MS + 1}), ("removed", (b"expires", b"junk", b"\xff"))]
    parts.index.clear()
    assert parts.expiry.answer_due({}, now_ms=NOW_MS, zone=UTC) == 0
    assert parts.index == []


@pytest.mark.parametrize("count", [0, 3, CHUNK_SIZE, CHUNK_SIZE + 2])
def test_quarantined_messages_are_answered_and_stay(parts: Parts, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """All of them, portion by portion; those that are answered already only once."""

    def late(_: str, records: list[bytes], **__: Any) -> Any:
        return (SimpleNamespace(id=raw.decode(), fields={}, ignore_result=False) for raw in records)

    monkeypatch.setattr(module, "late_messages", late)
    parts.lists[QUARANTINE] = [f"q{n}".encode() for n in range(count)]
    parts.marks = {"q1"} if count > 1 else set()
    assert parts.expiry.expire_quarantined(zone=UTC) == max(0, count - len(parts.marks))
    assert len({entry.id for entry in parts.written}) == len(parts.written) == max(0, count - len(parts.marks))
    assert len(parts.lists[QUARANTINE]) == count
    assert len(parts.reads) == count // CHUNK_SIZE + 1


def test_sweep_of_the_quarantine_is_bounded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer one is left to the workers."""
    monkeypatch.setattr(module, "late_messages", lambda *_, **__: iter(()))
    parts.lists[QUARANTINE] = [b"q"] * (MAX_CHECKED + CHUNK_SIZE)
    assert parts.expiry.expire_quarantined(zone=UTC) == 0
    assert sum(parts.reads) == MAX_CHECKED


def test_scan_answers_what_it_finds(parts: Parts) -> None:
    """By one write; a scan that finds nothing writes nothing."""
    assert parts.expiry.scan(now_ms=NOW_MS, zone=UTC) == 0
    assert parts.tokens == []
    assert parts.expiry.scanned_ms == NOW_MS
    parts.lists[KEY] = lane("late", "soon", "late")
    parts.marks = {"late2"}
    assert parts.expiry.scan(now_ms=NOW_MS + 9, zone=UTC) == 2
    assert sorted(entry.id for entry in parts.written) == ["late0", "soon1"]
    assert parts.expiry.scanned_ms == NOW_MS + 9


def test_one_message_behind_the_place_ends_a_lane(parts: Parts) -> None:
    """The messages before it were checked by the last sweep, and are not read again by this one."""
    parts.lists[KEY] = lane(*["never"] * 11)
    assert parts.sweep(portion=5, limit=10) == (0, 1)
    parts.reads.clear()
    assert parts.sweep(portion=5, limit=10) == (0, 10)
    assert sum(parts.reads) == 1
