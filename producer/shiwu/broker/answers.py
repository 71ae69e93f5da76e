"""Writes answers to Redis: `AnswerStore` for workers and the sweep, `commit_steps` for cancelling clients.

One script writes a whole batch. The first answer of an id is stored in Celery's result format, published to waiters and
appended to the results stream; later answers are discarded. Either way, claim, lease and attempts are removed. An
answer of another generation than the id waits for is discarded too, and changes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self

import msgspec
import redis
from pydantic_core import to_json

from shiwu.broker.connection import run_on_connection
from shiwu.broker.redis_errors import NotReplicated
from shiwu.broker.retention import DEFAULT_RETENTION, Retention
from shiwu.broker.script_loader import call_script, load_script
from shiwu.broker.steps import Steps
from shiwu.contract import (
    ANSWERED_CHANNEL,
    ATTEMPTS,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    FOREIGN,
    HISTORIES,
    HISTORIES_EXPIRY,
    LEASES,
    MARKS,
    MAX_MESSAGE_BYTES,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    RESULT_STREAM,
    Answer,
    ErrorCode,
    ErrorInfo,
    Stage,
    Status,
    done_key,
    is_digest,
    moment,
    result_key,
    status_of,
)

MAX_COMMIT: Final = 5000
"""Answers in one `write`. Lua's stack holds about 8,000 values, and the script unpacks one for each answer."""
CALLBACKS_RESERVED_S: Final = 30.0
"""How long only the worker that answered a job sends its callbacks; afterwards any worker may send them."""
MAX_CALLBACKS_RESERVED_S: Final = 60.0
"""Longest reservation. Longer ones are shortened, as after the server's clock was set back."""
_STATE_LETTERS: Final[dict[str, str]] = {Status.TAGGED: "S", Status.EXPIRED: "R", Status.CANCELLED: "R"}
_KEYS: Final = (
    *(CLAIMS, LEASES, ATTEMPTS, RESULT_STREAM, DEAD, DEAD_ANSWERS, DEAD_MESSAGES, COUNTERS),
    *(DEADLINES, CANVAS, CANVAS_DUE, DELAYED, DELAYED_MESSAGES),
    *(PENDING_ANSWERS, PENDING_ANSWERS_EXPIRY, HISTORIES, HISTORIES_EXPIRY),
)
_NO_ID: Final = "\0"
HEAD_BYTES: Final = 1024
"""Kept of a message that is larger than any message that a worker accepts."""
_CUT: Final = b"~cut:"


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """The message of a dead letter as it is kept."""

    lane_key: str
    message: bytes
    """As it was sent, or its first bytes."""
    size: int
    sha256: str | None = None
    """Of the whole message, in hexadecimal, where only its first bytes are kept; such a letter cannot be requeued."""

    @classmethod
    def read(cls, record: bytes) -> Self:
        """Read what `dead_message` wrote."""
        if record.startswith(_CUT):
            digest, size, key, head = record[len(_CUT) :].split(b":", 3)
            return cls(key.decode(errors="replace"), head, int(size), digest.decode())
        key, _, raw = record.partition(b"|")
        return cls(key.decode(errors="replace"), raw, len(raw))


def dead_message(lane_key: str, raw: bytes) -> bytes:
    """What is kept of the message of a dead letter: all of it, or digest and head of one that is always refused.

    A record without `|` is one that `requeue.lua`, also of earlier versions, does not requeue.
    """
    if len(raw) <= MAX_MESSAGE_BYTES:
        return lane_key.encode() + b"|" + raw
    head = raw[:HEAD_BYTES].replace(b"|", b"?")
    return b"%s%s:%d:%s:%s" % (_CUT, hashlib.sha256(raw).hexdigest().encode(), len(raw), lane_key.encode(), head)


class AnswerEntry(msgspec.Struct, frozen=True, gc=False):
    """One answer on its way to Redis."""

    answer: Answer
    id: str
    """The job id, or `~` and a digest where the message has none."""
    claim: str = ""
    """The name of the claim where it differs from the id: a digest, where only the worker could find the id."""
    ignore_result: bool = False
    message: bytes = b""
    """`lane key|message bytes` of a job that becomes a dead letter or has callbacks; otherwise empty."""
    is_dead: bool = False
    has_callbacks: bool = False
    has_reply_to: bool = False
    """A Celery client waits for the answer. On a cluster it is announced on all nodes then."""
    is_from_outside: bool = False
    """The writer does not hold the job, as a cancelling client. A worker that holds the job is notified."""
    generation: int = 0
    """The generation of the job that was claimed; no matter where the writer does not hold the job."""

    @property
    def kind(self) -> str:
        """For `commit.lua`: a letter for the state, one for each flag, and the generation where it is not 0."""
        kind = _STATE_LETTERS.get(self.answer.status, "F")
        if self.ignore_result:
            kind += "I"
        if self.is_dead:
            kind += "D"
        if self.has_callbacks:
            kind += "C"
        if self.has_reply_to:
            kind += "P"
        if not self.claim and self.id.startswith("~") and is_digest(self.id):
            kind += "N"
        if self.is_from_outside:
            return kind + "A"
        return f"{kind}{self.generation}" if self.generation else kind


class AnswerStore:
    """Writes answers. Thread-safe. After a redis.RedisError the same answers may be written again.

    Args:
        token: unique to one run of this writer; a repeated write recognises its own answers by it.
        retention: called at each write; how long answers, marks of answered ids and dead letters are kept.
        callbacks_reserved_s: how long only the writer's worker sends the callbacks of an answer.
        replicas: how many replicas must confirm each write within `replicas_timeout_s`.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        token: str,
        retention: Callable[[], Retention] = lambda: DEFAULT_RETENTION,
        callbacks_reserved_s: float = CALLBACKS_RESERVED_S,
        replicas: int = 0,
        replicas_timeout_s: float = 1.0,
    ) -> None:
        self._client = client
        self._token = token
        self._replicas = replicas
        self._replicas_timeout_s = replicas_timeout_s
        self._script = load_script(client, "commit")
        self._retention = retention
        self._callbacks_reserved_s = callbacks_reserved_s

    def write(self, entries: Sequence[AnswerEntry], *, token: str | None = None) -> set[str]:
        """Write up to MAX_COMMIT answers; return the ids whose answers were discarded.

        An answer is discarded where another writer answered the id before, or the job was requeued after its claim.

        Args:
            token: replaces the store's token in this write, so that an id that the same store answered before is
                returned too.

        Raises:
            NotReplicated: the answers are stored on the primary only.
            redis.RedisError: Redis is unavailable or refuses the write.
        """
        if not entries:
            return set()
        retention = self._retention()
        args = commit_args(
            entries,
            token=token or self._token,
            retention=retention,
            callbacks_reserved_s=self._callbacks_reserved_s,
        )
        keys = commit_keys(entries, has_old_marks=bool(retention.old_marks))
        if not self._replicas:
            again: list[bytes] = self._script(keys=keys, args=args)
        else:
            # WAIT counts only the writes of its own connection.
            with self._client.client() as connected:  # type: ignore[no-untyped-call]  # redis' own
                again = self._script(keys=keys, args=args, client=connected)
                wait_replicated(connected, replicas=self._replicas, timeout_s=self._replicas_timeout_s)
        return {job_id.decode() for job_id in again}


def commit_steps(entries: Sequence[AnswerEntry], *, token: str, retention: Retention) -> Steps[set[str]]:
    """Write up to MAX_COMMIT answers once, as `AnswerStore.write` does; return the ids whose answers were discarded."""
    args = commit_args(entries, token=token, retention=retention, callbacks_reserved_s=CALLBACKS_RESERVED_S)
    again = yield call_script("commit", keys=commit_keys(entries, has_old_marks=bool(retention.old_marks)), args=args)
    return {job_id.decode() for job_id in again}


def commit_keys(entries: Sequence[AnswerEntry], *, has_old_marks: bool) -> list[str]:
    """The keys of `commit.lua`; with `has_old_marks` also those of versions before `MARKS`, which may run as well."""
    moved_stream = f"{FOREIGN}{RESULT_STREAM}:{time.time() * 1000:.0f}"
    keys = [*_KEYS, moved_stream, *MARKS, *(result_key(entry.id) for entry in entries)]
    if has_old_marks:
        keys += [done_key(entry.id) for entry in entries]
    return keys


def commit_args(
    entries: Sequence[AnswerEntry], *, token: str, retention: Retention, callbacks_reserved_s: float
) -> list[Any]:
    """The arguments of `commit.lua`."""
    limits = (
        retention.result_ttl_s,
        max(retention.done_ttl_s, retention.result_ttl_s),
        retention.dead_length,
    )
    reserved_ms = int(callbacks_reserved_s * 1000)
    args: list[Any] = [*limits, datetime.now(UTC).isoformat(), ANSWERED_CHANNEL, reserved_ms]
    for entry in entries:
        answer = entry.answer
        kind, mark = entry.kind, f"{token}:{answer.attempts}"
        head = b"" if kind.startswith("S") else failure_head(answer)
        args += [entry.id, kind, answer.to_json(), head, entry.message, mark, entry.claim]
    return args


def wait_replicated(connected: redis.Redis, *, replicas: int, timeout_s: float) -> None:
    """Wait until so many replicas have confirmed what this connection wrote.

    Args:
        connected: a client that holds one connection, from `Redis.client()`.

    Raises:
        NotReplicated: too few replicas confirmed it within `timeout_s`.
    """
    [reached] = run_on_connection(connected, wait_command(replicas=replicas, timeout_s=timeout_s))
    check_replicated(reached, replicas=replicas, timeout_s=timeout_s)


def wait_command(*, replicas: int, timeout_s: float) -> tuple[Any, ...]:
    """The command whose reply is the number of replicas that have confirmed the writes of its connection."""
    # At least 1 ms: with a time-out of 0 the server would wait forever.
    return ("WAIT", replicas, max(1, int(timeout_s * 1000)))


def check_replicated(reached: int, *, replicas: int, timeout_s: float) -> None:
    """Compare the reply of `wait_command` with what was asked.

    Raises:
        NotReplicated: too few replicas confirmed it.
    """
    if reached < replicas:
        raise NotReplicated(
            f"expected {replicas} replicas to confirm within {timeout_s:g} s, {reached} did; the write stands on the "
            "primary, and writing the same id again is safe"
        )


def failure_head(answer: Answer) -> bytes:
    """Celery's form of an exception without its closing brace, so that the script can append the answer."""
    if answer.status is Status.TAGGED:
        return b""
    return to_json(exception_form(answer))[:-1]


def exception_form(answer: Answer) -> dict[str, Any]:
    """The exception that `AsyncResult.get()` raises, in the form of Celery's JSON results."""
    if answer.status in {Status.EXPIRED, Status.CANCELLED}:
        return {
            "exc_type": "TaskRevokedError",
            "exc_message": [str(answer.status)],
            "exc_module": "celery.exceptions",
        }
    error = answer.error
    message = f"{error.code}: {error.message}" if error else str(answer.status)
    return {"exc_type": "JobFailed", "exc_message": [message], "exc_module": "shiwu.errors"}


def answered_before(worker: str, *, now_ms: float) -> bytes:
    """Celery's result for a duplicate whose answer is no longer kept. A zero byte stands in each place of the id."""
    now = moment(now_ms)
    text = "the id was answered before, and its answer is no longer kept; send each job with an id of its own"
    error = ErrorInfo(code=ErrorCode.ALREADY_ANSWERED, message=text, stage=Stage.CLAIM)
    answer = Answer(id=_NO_ID, status=status_of(error.code), attempts=0, worker=worker, error=error, answered_at=now)
    meta: dict[str, Any] = {
        "status": "FAILURE",
        "result": exception_form(answer) | {"answer": msgspec.to_builtins(answer)},
        "traceback": None,
        "children": [],
        "date_done": now.isoformat(),
        "task_id": _NO_ID,
    }
    return to_json(meta).replace(to_json(_NO_ID), b"\0")
