"""What the commit script is told about an answer, and what Celery clients read of it."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.broker import answers as module
from shiwu.broker.answers import (
    HEAD_BYTES,
    AnswerEntry,
    AnswerStore,
    DeadMessage,
    answered_before,
    dead_message,
    exception_form,
    failure_head,
    wait_command,
    wait_replicated,
)
from shiwu.broker.redis_errors import NotReplicated
from shiwu.broker.retention import Retention
from shiwu.client.results import read_result
from shiwu.contract import FOREIGN, MARKS, MAX_MESSAGE_BYTES, Answer, ErrorCode, ErrorInfo, Status, done_key, result_key

DIGEST = "~" + "0a" * 20


def kind(status: Status = Status.TAGGED, *, job_id: str = "a", **fields: Any) -> str:
    """The kind of an entry."""
    return AnswerEntry(id=job_id, answer=Answer(id=job_id, status=status), **fields).kind


def test_each_status_has_its_letter() -> None:
    """Celery knows three states: what was revoked has its own, and what was not tagged has failed."""
    assert kind(Status.TAGGED) != kind(Status.FAILED)
    assert kind(Status.FAILED) == kind(Status.REJECTED) == "F"
    assert kind(Status.CANCELLED) == kind(Status.EXPIRED) not in {kind(Status.TAGGED), "F"}


@pytest.mark.parametrize(
    ("fields", "letter"),
    [
        ({"ignore_result": True}, "I"),
        ({"is_dead": True}, "D"),
        ({"has_callbacks": True}, "C"),
        ({"has_reply_to": True}, "P"),
        ({"job_id": DIGEST}, "N"),
        ({"is_from_outside": True}, "A"),
        ({"generation": 12}, "12"),
    ],
)
def test_each_flag_has_its_letter(fields: dict[str, Any], letter: str) -> None:
    """And nothing else changes."""
    assert kind(**fields) == kind() + letter


def test_flags_stand_together() -> None:
    """The generation counts only for a writer that holds the job."""
    plain = kind()
    flags = {"ignore_result": True, "is_dead": True, "has_callbacks": True}
    assert kind(**flags, generation=3) == plain + "IDC3"
    assert kind(**flags, generation=3, is_from_outside=True) == plain + "IDCA"
    assert kind(job_id=DIGEST, claim=DIGEST) == plain, "the claim names the digest"
    assert kind(job_id="~no digest") == plain


class Store:
    """An `AnswerStore` whose script keeps what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.calls: list[tuple[list[Any], Any]] = []
        self.keys: list[str] = []
        self.replicated: list[tuple[Any, int, float]] = []
        self.again: list[bytes] = []
        monkeypatch.setattr(module, "load_script", lambda *_: self._run)
        monkeypatch.setattr(module, "wait_replicated", self._replicate)
        client: Any = SimpleNamespace(client=lambda: nullcontext("one connection"))
        self.store = AnswerStore(client, token="t", retention=lambda: self.retention, **options)
        self.retention = Retention(result_ttl_s=60, done_ttl_s=120, dead_length=7)

    def _run(self, *, keys: Any, args: list[Any], client: Any = None) -> list[bytes]:
        self.keys = list(keys)
        self.calls.append((args, client))
        return self.again

    def _replicate(self, connected: Any, *, replicas: int, timeout_s: float) -> None:
        self.replicated.append((connected, replicas, timeout_s))


def entry_of(job_id: str, **fields: Any) -> AnswerEntry:
    """An answer with two attempts."""
    return AnswerEntry(id=job_id, answer=Answer(id=job_id, status=Status.FAILED, attempts=2), **fields)


def test_script_gets_limits_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven values for each answer; the mark of an id is kept at least as long as its answer."""
    place = Store(monkeypatch, callbacks_reserved_s=2.5)
    place.again = [b"b"]
    first, second = entry_of("a", message=b"m"), entry_of("b", claim="c")
    assert place.store.write([first, second]) == {"b"}
    [(args, client)] = place.calls
    assert client is None
    assert args[:3] == [60, 120, 7]
    assert args[5] == 2500
    moved_stream, *marks = place.keys[17:22]
    assert marks == list(MARKS)
    assert moved_stream.startswith(FOREIGN)
    assert abs(float(moved_stream.rpartition(":")[2]) - time.time() * 1000) < 60_000
    assert place.keys[22:] == [result_key("a"), result_key("b"), done_key("a"), done_key("b")]
    answers = [args[at : at + 7] for at in range(6, len(args), 7)]
    expected = [
        [each.id, each.kind, each.answer.to_json(), failure_head(each.answer), each.message, "t:2", each.claim]
        for each in (first, second)
    ]
    assert answers == expected
    place.retention = Retention(result_ttl_s=200, done_ttl_s=120, dead_length=7, old_marks=0)
    place.store.write([first], token="mine")
    assert place.calls[1][0][:2] == [200, 200]
    assert place.keys[22:] == [result_key("a")], "no keys of earlier versions"
    assert place.calls[1][0][11] == "mine:2"
    assert place.store.write([]) == set()
    assert len(place.calls) == 2
    assert place.replicated == []


def test_replicas_are_awaited_on_the_connection_of_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis counts the writes of one connection."""
    place = Store(monkeypatch, replicas=2, replicas_timeout_s=0.5)
    place.store.write([entry_of("a")])
    assert place.calls[0][1] == "one connection"
    assert place.replicated == [("one connection", 2, 0.5)]


@pytest.mark.parametrize(("reached", "is_enough"), [(1, False), (2, True), (3, True)])
def test_too_few_replicas_are_an_error(monkeypatch: pytest.MonkeyPatch, reached: int, *, is_enough: bool) -> None:
    """The write stands; more replicas than asked for are fine."""
    commands: list[Any] = []

    def run(_: Any, command: Any) -> list[int]:
        commands.append(command)
        return [reached]

    monkeypatch.setattr(module, "run_on_connection", run)
    connected: Any = object()
    if is_enough:
        wait_replicated(connected, replicas=2, timeout_s=0.5)
    else:
        with pytest.raises(NotReplicated, match=r"2 replicas to confirm within 0\.5 s, 1 did"):
            wait_replicated(connected, replicas=2, timeout_s=0.5)
    assert commands == [("WAIT", 2, 500)]


def test_celery_gets_an_exception_of_each_failure() -> None:
    """What was revoked has Celery's own; a tagged answer has none. The script closes the brace."""
    error = ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut")
    failed = Answer(id="a", status=Status.REJECTED, error=error)
    assert exception_form(failed) == {
        "exc_type": "JobFailed",
        "exc_message": ["picture_broken: cut"],
        "exc_module": "shiwu.errors",
    }
    assert exception_form(Answer(id="a", status=Status.FAILED))["exc_message"] == ["failed"]
    for status in (Status.EXPIRED, Status.CANCELLED):
        form = exception_form(Answer(id="a", status=status, error=error))
        assert (form["exc_type"], form["exc_message"]) == ("TaskRevokedError", [str(status)])
    assert failure_head(Answer(id="a", status=Status.TAGGED)) == b""
    assert json.loads(failure_head(failed) + b"}") == exception_form(failed)


def test_duplicate_of_a_forgotten_answer_has_an_error() -> None:
    """In Celery's form, with a zero byte wherever the script puts the id."""
    raw = answered_before("w", now_ms=5000.0)
    assert raw.count(b"\0") == 2
    meta = json.loads(raw.replace(b"\0", b'"job"'))
    found = read_result(raw.replace(b"\0", b'"job"'))
    assert (meta["status"], meta["task_id"], meta["traceback"], meta["children"]) == ("FAILURE", "job", None, [])
    assert meta["date_done"] == "1970-01-01T00:00:05+00:00"
    assert (found.id, found.attempts, found.worker) == ("job", 0, "w")
    assert found.error is not None
    assert found.error.code is ErrorCode.ALREADY_ANSWERED


@pytest.mark.parametrize(("size", "is_kept"), [(3, True), (MAX_MESSAGE_BYTES, True), (MAX_MESSAGE_BYTES + 1, False)])
def test_message_of_a_dead_letter_is_kept_or_cut(size: int, *, is_kept: bool) -> None:
    """Of one that every worker refuses the beginning is kept, and the digest; it cannot be requeued."""
    raw = (b"a|b:" * (size // 4 + 1))[:size]
    record = dead_message("shiwu.bulk", raw)
    found = DeadMessage.read(record)
    assert (found.lane_key, found.size) == ("shiwu.bulk", size)
    assert (b"|" in record) is is_kept
    if is_kept:
        assert (found.message, found.sha256) == (raw, None)
    else:
        assert found.message == raw[:HEAD_BYTES].replace(b"|", b"?")
        assert found.sha256 == hashlib.sha256(raw).hexdigest()


def test_replicas_are_never_awaited_without_a_limit() -> None:
    """WAIT takes 0 ms as no limit."""
    assert wait_command(replicas=1, timeout_s=0.0005) == ("WAIT", 1, 1)
