"""Where a job is and why: what `explain` finds out about one id."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from shiwu.broker.history import read_history
from shiwu.broker.marks import MARK_REPLIES, ask_for_marks, found_marks
from shiwu.broker.message_ids import find_id
from shiwu.broker.message_reader import Envelope, read_message
from shiwu.broker.steps import Steps
from shiwu.client.results import TagResult, read_answer, read_result
from shiwu.client.usual_times import UsualTime, usual_times
from shiwu.contract import (
    ATTEMPTS,
    CANVAS_DUE,
    CLAIMS,
    DEAD,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    HISTORIES,
    LEASES,
    QUARANTINE,
    RESULT_STREAM,
    REVOKED,
    Attempt,
    Lane,
    RequestError,
    Timing,
    result_key,
)
from shiwu.errors import ForeignResult

MAX_SEARCHED: Final = 20_000
"""Messages of each list that are searched for the id: Redis cannot look into a list by itself."""
PAGE: Final = 500
"""Messages of one read; at most 128 MB of the largest ones."""
SAMPLE: Final = 200
"""Newest answers that the usual times are taken from."""
SAMPLE_PAGE: Final = 50


class JobState(StrEnum):
    """Where a job is."""

    WAITING = "waiting"
    """Its message is in a lane."""
    DELAYED = "delayed"
    """It waits for a retry or a countdown."""
    QUARANTINED = "quarantined"
    """Workers died while they held it; it runs alone."""
    CLAIMED = "claimed"
    """A worker holds it."""
    ANSWERED = "answered"
    """Its answer can be read."""
    ANSWER_EXPIRED = "answer_expired"
    """It was answered; the answer is no longer kept."""
    FOREIGN = "foreign"
    """The id belongs to another Celery task."""
    UNKNOWN = "unknown"
    """Nothing is known of the id: never enqueued, or answered so long ago that its mark has expired too."""


@dataclass(frozen=True, slots=True)
class JobReport:
    """What is known of one id. Times are in ms since 1970 by Redis' clock."""

    id: str
    state: JobState
    now_ms: float
    lane: Lane | None = None
    image: str | None = None
    """The image's reference as in the message, for an unanswered job."""
    sent_ms: float | None = None
    ahead: int | None = None
    """Messages that are claimed before it, where it waits in a lane or in quarantine."""
    is_searched_whole: bool = True
    """False: the lists are longer than what was searched, so a job of state `unknown` may wait further back."""
    due_ms: float | None = None
    """When a delayed job returns to its lane."""
    worker: str | None = None
    """The worker that holds it."""
    attempt: int | None = None
    lease_ms: float | None = None
    """Until when the worker holds it without renewing its lease."""
    answer_by_ms: float | None = None
    """By when it has an answer, `expired` if no other."""
    deaths: int = 0
    """Workers that died while they held it."""
    is_revoked: bool = False
    """Celery's `revoke` named it: it ends `cancelled` when it is claimed."""
    dead_ms: float | None = None
    """When it became a dead letter, which can be requeued."""
    callbacks_due_ms: float | None = None
    """Since when its callbacks wait to be sent."""
    history: tuple[Attempt, ...] = ()
    """Earlier attempts, the oldest first."""
    result: TagResult | None = None
    """Its answer."""
    usual: Mapping[str, UsualTime] = field(default_factory=dict)
    """Field of `Timing` → its usual time; empty where the stream holds no answers."""
    sample: int = 0
    """How many answers these times are from."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """The replies of all keys that can be looked up by id, read at one moment."""

    now_ms: float
    result: bytes | None
    mark: bytes | None
    claim: bytes | None
    lease_ms: float | None
    due_ms: float | None
    delayed: bytes | None
    dead_ms: float | None
    revoked_ms: float | None
    answer_by_ms: float | None
    callbacks_due_ms: float | None
    history: bytes | None
    attempts: bytes | None

    @property
    def is_found(self) -> bool:
        return bool(self.result or self.mark or self.claim or self.delayed)


def report_steps(job_id: str) -> Steps[JobReport]:
    """Find a job by its id: first by the keys, then in the lists, and once more by the keys, for it may have moved."""
    facts = yield from _facts_steps(job_id)
    found, is_whole = None, True
    if not facts.is_found:
        found, is_whole = yield from _search_steps(job_id)
        if found is None:
            facts = yield from _facts_steps(job_id)
    report = _report(job_id, facts, found, is_searched_whole=is_whole)
    if report.result is None:
        return report
    usual, sample = yield from _usual_steps(report.result)
    return replace(report, usual=usual, sample=sample)


def _facts_steps(job_id: str) -> Steps[_Facts]:
    def read(client: Any) -> Any:
        pipe = client.pipeline(transaction=True)
        pipe.time()
        pipe.get(result_key(job_id))
        ask_for_marks(pipe, [job_id])
        pipe.hget(CLAIMS, job_id)
        pipe.zscore(LEASES, job_id)
        pipe.zscore(DELAYED, job_id)
        pipe.hget(DELAYED_MESSAGES, job_id)
        pipe.zscore(DEAD, job_id)
        pipe.zscore(REVOKED, job_id)
        pipe.zscore(DEADLINES, job_id)
        pipe.zscore(CANVAS_DUE, job_id)
        pipe.hget(HISTORIES, job_id)
        pipe.hget(ATTEMPTS, job_id)
        return pipe.execute()

    (seconds, micros), result, *others = yield read
    [mark] = found_marks(others[:MARK_REPLIES])
    return _Facts(seconds * 1000 + micros / 1000, result, mark, *others[MARK_REPLIES:])


@dataclass(frozen=True, slots=True)
class _InList:
    """A message that was found in a list."""

    key: str
    ahead: int
    message: bytes


def _search_steps(job_id: str) -> Steps[tuple[_InList | None, bool]]:
    """Look through the quarantine and the lanes, the next message first; also whether all of them were searched."""
    is_whole = True
    for keys in ((QUARANTINE,), *(lane.keys for lane in Lane)):
        ahead = 0
        for key in keys:
            for begin in range(0, MAX_SEARCHED, PAGE):
                # Messages are taken from the right end.
                page: Sequence[bytes] = yield _page_call(key, begin)
                for message in reversed(page):
                    if _is_message_of(message, job_id, is_record=key == QUARANTINE):
                        return _InList(key, ahead, message), is_whole
                    ahead += 1
                if len(page) < PAGE:
                    break
            else:
                is_whole = False
    return None, is_whole


def _page_call(key: str, begin: int) -> Any:
    return lambda client: client.lrange(key, -begin - PAGE, -begin - 1)


def _is_message_of(message: bytes, job_id: str, *, is_record: bool) -> bool:
    if job_id.encode() not in message:
        return False
    return find_id(message.partition(b"|")[2] if is_record else message) == job_id


def _report(job_id: str, facts: _Facts, found: _InList | None, *, is_searched_whole: bool) -> JobReport:
    record = found.message if found is not None and found.key == QUARANTINE else facts.delayed or b""
    lane_key, _, raw = record.decode(errors="surrogateescape").partition("|")
    message = raw.encode(errors="surrogateescape")
    token = attempt = None
    if facts.claim is not None:
        parts = [*facts.claim.split(b"|", 3), b"", b"", b""][:4]
        token, lane_key, message = parts[0].decode(errors="replace"), parts[2].decode(errors="replace"), parts[3]
        attempt = int(parts[1]) if parts[1].isdigit() else None
    elif found is not None and found.key != QUARANTINE:
        lane_key, message = found.key, found.message
    envelope = _read(message)
    result, is_foreign = _read_result(facts.result)
    state = _state(facts, found, is_foreign=is_foreign)
    _, _, deaths = (facts.attempts or b"").partition(b":")
    image = envelope.fields.get("image") if envelope is not None else None
    return JobReport(
        id=job_id,
        state=state,
        now_ms=facts.now_ms,
        lane=next((lane for lane in Lane if lane_key in lane.keys), None),
        image=image if isinstance(image, str) else None,
        sent_ms=envelope.sent_ms if envelope is not None else None,
        ahead=found.ahead if found is not None else None,
        is_searched_whole=is_searched_whole,
        due_ms=facts.due_ms,
        worker=token.rpartition(".")[0] if token else None,
        attempt=attempt,
        lease_ms=facts.lease_ms,
        answer_by_ms=facts.answer_by_ms,
        deaths=int(deaths) if deaths.isdigit() else 0,
        is_revoked=facts.revoked_ms is not None,
        dead_ms=facts.dead_ms,
        callbacks_due_ms=facts.callbacks_due_ms,
        history=read_history(facts.history or b"") or (result.history if result is not None else None) or (),
        result=result,
    )


def _state(facts: _Facts, found: _InList | None, *, is_foreign: bool) -> JobState:
    # A requeued or repeated job may have an answer from before: what it does now comes first.
    if facts.claim is not None:
        return JobState.CLAIMED
    if facts.delayed is not None:
        return JobState.DELAYED
    if facts.result is not None:
        return JobState.FOREIGN if is_foreign else JobState.ANSWERED
    if facts.mark is not None:
        return JobState.ANSWER_EXPIRED
    if found is not None:
        return JobState.QUARANTINED if found.key == QUARANTINE else JobState.WAITING
    return JobState.UNKNOWN


def _read(message: bytes) -> Envelope | None:
    with contextlib.suppress(RequestError):
        return read_message(message) if message else None
    return None


def _read_result(raw: bytes | None) -> tuple[TagResult | None, bool]:
    """The answer, and whether the value is the result of another task."""
    if raw is None:
        return None, False
    try:
        return read_result(raw), False
    except ForeignResult:
        return None, True


def _usual_steps(result: TagResult) -> Steps[tuple[dict[str, UsualTime], int]]:
    """The usual times of answers with the same status and lane."""
    timings: list[Timing] = []
    end, seen = "+", 0
    while seen < SAMPLE:
        entries = yield _newest_call(end)
        for _, fields in entries:
            other = read_answer(fields.get(b"answer", b""), job_id="")
            if other.status == result.status and other.lane == result.lane and other.id != result.id:
                timings.append(other.timing)
        seen += len(entries)
        if len(entries) < SAMPLE_PAGE:
            break
        end = f"({entries[-1][0].decode()}"
    return usual_times(timings), len(timings)


def _newest_call(end: str) -> Any:
    return lambda client: client.xrevrange(RESULT_STREAM, end, "-", count=SAMPLE_PAGE)
