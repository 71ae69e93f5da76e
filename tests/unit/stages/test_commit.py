"""The commit thread without a server: what it takes at a time, what it repeats, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Tag
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.outcome import Answered, CommittedJob, Outcome, Released
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.stages import commit as module
from shiwu_worker.stages.commit import Committer, to_entries, to_entry

AWAY = redis.ConnectionError("away")


class Parts:
    """A committer over a server with these errors, one for each try."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.answered_before: set[str] = set()
        self.written: list[list[str]] = []
        self.released: list[list[str]] = []
        self.waits: list[Exception] = []
        self.resets = 0
        self.committed: list[CommittedJob] = []
        self.given_back: list[Released] = []
        store: Any = SimpleNamespace(write=self._write)
        backoff: Any = SimpleNamespace(wait=lambda error, _: self.waits.append(error), reset=self._reset)
        self.committer = Committer(store, worker="w", release=self._release, backoff=backoff, on_fatal=pytest.fail)

    def _try(self) -> None:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def _write(self, entries: Sequence[Any]) -> set[str]:
        self._try()
        self.written.append([entry.id for entry in entries])
        return self.answered_before

    def _release(self, releases: Sequence[Release]) -> int:
        self._try()
        self.released.append([release.id for release in releases])
        return 0

    def _reset(self) -> None:
        self.resets += 1

    def run(self, *portions: list[Outcome]) -> bool:
        """Commit these, and end; whether nothing is left."""
        for portion in portions:
            self.committer.put(portion)
        self.committer.start(on_committed=self.committed.extend, on_released=self.given_back.extend)
        return self.committer.close(timeout_s=20.0)


def make_job(job_id: str, **fields: Any) -> Job:
    """A job that was claimed."""
    moments = StageTimestamps(claimed_s=0.0)
    return Job(**{"id": job_id, "key": Lane.BULK.queue, "attempt": 1, "raw": b"raw", "moments": moments} | fields)


def test_all_that_was_put_is_committed_at_the_end() -> None:
    """Answers and releases each in one call, the oldest first; a duplicate is reported as such."""
    parts = Parts()
    parts.answered_before = {"b"}
    outcomes: list[Outcome] = [Answered(make_job(name)) for name in ("a", "b")]
    release = Released(make_job("c"), Release("c"))
    assert parts.run([outcomes[0], release], [outcomes[1]])
    assert (parts.written, parts.released) == ([["a", "b"]], [["c"]])
    assert [(each.job.id, each.entry.id) for each in parts.committed] == [("a", "a"), ("b", "b")]
    assert [each.is_first for each in parts.committed] == [True, False]
    assert parts.given_back == [release]
    assert (parts.waits, parts.resets) == ([], 2)


def test_only_what_there_is_is_written() -> None:
    """No call for no answers, and none for no releases."""
    parts = Parts()
    assert parts.run([Answered(make_job("a"))])
    assert (parts.written, parts.released) == ([["a"]], [])
    parts = Parts()
    assert parts.run([Released(make_job("a"), Release("a"))])
    assert (parts.written, parts.released) == ([], [["a"]])


def test_batch_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch takes the rest."""
    monkeypatch.setattr(module, "MAX_BATCH", 3)
    parts = Parts()
    names = ["a", "b", "c", "d", "e", "f"]
    jobs: list[Outcome] = [Answered(make_job(name)) for name in names]
    assert parts.run(jobs[:2], jobs[2:4], jobs[4:5], jobs[5:])
    assert parts.written == [["a", "b", "c"], ["d", "e", "f"]]


def test_interactive_answers_wait_for_one_bulk_commit_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane has commits of its own, in turns, and bulk ends a commit after so many bytes."""
    monkeypatch.setattr(module, "MAX_BULK_BYTES", 90_000)
    monkeypatch.setattr(module, "MAX_BATCH", 3)
    parts = Parts()
    large = tuple(Tag("标签" * 20, 0.5, 0.2) for _ in range(500))
    bulk: list[Outcome] = [Answered(make_job(f"large-{number}", tags=large)) for number in range(3)]
    small: list[Outcome] = [Answered(make_job(f"small-{number}")) for number in range(2)]
    users: list[Outcome] = [Answered(make_job(f"user-{number}", key=Lane.INTERACTIVE.queue)) for number in range(4)]
    assert parts.run(bulk, [*small, *users])
    assert parts.written == [
        *(["user-0", "user-1", "user-2"], ["large-0"], ["user-3"], ["large-1"]),
        *(["large-2"], ["small-0", "small-1"]),
    ]


def test_commit_takes_what_comes_meanwhile() -> None:
    """An interactive answer that is put while bulk answers are written is in the next commit."""
    parts = Parts()
    large = tuple(Tag("标签" * 60, 0.5, 0.2) for _ in range(1000))
    write = parts.committer._answer_store.write

    def put_meanwhile(entries: Sequence[Any]) -> set[str]:
        if len(parts.written) == 0:
            parts.committer.put([Answered(make_job("user", key=Lane.INTERACTIVE.queue))])
        return write(entries)

    parts.committer._answer_store.write = put_meanwhile  # type: ignore[method-assign,assignment]  # no Redis
    assert parts.run([Answered(make_job(f"large-{number}", tags=large)) for number in range(3)])
    assert parts.written == [["large-0"], ["user"], ["large-1"], ["large-2"]]


def test_write_is_repeated_until_redis_answers() -> None:
    """The same answers, after a pause each; nothing is reported before."""
    parts = Parts(AWAY, AWAY)
    closing: Any = SimpleNamespace(is_set=lambda: len(parts.waits) == 2)
    parts.committer._closing = closing
    parts.committer.put([Answered(make_job("a"))])
    parts.committer._on_committed = parts.committed.extend
    parts.committer._run()
    assert (parts.written, parts.waits, parts.resets) == ([["a"]], [AWAY, AWAY], 1)
    assert [each.job.id for each in parts.committed] == ["a"]


def test_answers_that_cannot_be_written_end_with_the_process() -> None:
    """One try each while it closes; the leases of these jobs expire."""
    parts = Parts(AWAY, AWAY)
    parts.committer._closing.set()
    with capture_logs() as logs:
        parts.run([Answered(make_job("a")), Answered(make_job("b")), Released(make_job("c"), Release("c"))])
    assert [line["event"] for line in logs] == ["answers_not_committed"] * 2
    assert [line["jobs"] for line in logs] == [2, 1]
    assert (parts.written, parts.released, parts.committed, parts.given_back) == ([], [], [], [])


def test_close_says_whether_anything_is_left() -> None:
    """What the thread still holds at the end of its time is."""
    parts = Parts()
    free = threading.Event()
    parts.committer._answer_store.write = lambda _: free.wait(20) and set()  # type: ignore[method-assign]  # no Redis
    parts.committer.put([Answered(make_job("a"))])
    parts.committer.start(on_committed=parts.committed.extend, on_released=parts.given_back.extend)
    assert not parts.committer.close(timeout_s=0.01)
    free.set()
    assert parts.committer.close(timeout_s=20.0)


@pytest.mark.parametrize(
    ("fields", "code", "message", "is_dead"),
    [
        ({}, None, b"", False),
        ({"has_callbacks": True}, None, b"shiwu.bulk|raw", False),
        ({}, ErrorCode.PICTURE_BROKEN, b"shiwu.bulk|raw", True),
        ({}, ErrorCode.ENCODE_FAILED, b"shiwu.bulk|raw", True),
        ({}, ErrorCode.EXPIRED, b"", False),
        ({}, ErrorCode.CANCELLED, b"", False),
    ],
)
def test_message_is_kept_for_dead_letters_and_callbacks(
    fields: dict[str, Any], code: ErrorCode | None, message: bytes, *, is_dead: bool
) -> None:
    """Not for other answers."""
    job = make_job("a", **fields)
    if code is not None:
        job.fail(ErrorInfo(code=code, message="x"))
    [entry] = to_entries([job], worker="w", now_s=5.0)
    assert (entry.message, entry.is_dead, entry.has_callbacks) == (message, is_dead, bool(fields))
    assert (entry.id, entry.claim, entry.answer.worker) == ("a", "", "w")
    assert to_entries([], worker="w", now_s=5.0) == []


def test_answer_goes_to_the_id_of_its_caller() -> None:
    """Where the claim has another name, which is a digest; its generation and its wish come along."""
    job = make_job("~digest", answer_id="real", ignore_result=True, generation=4)
    entry = to_entry(job, worker="w", until_s=1.0, answered_at=job.server_time(1.0))
    assert (entry.id, entry.claim, entry.ignore_result, entry.generation) == ("real", "~digest", True, 4)
