"""Callbacks: sends what `link`, `link_error`, chain and chord of a message ask for, after its job was answered.

The commit stores the callbacks of a job in Redis, in the same step as the answer. The callbacks thread sends them with
Celery's functions and deletes them afterwards. If a worker crashes in between, another worker sends them, so a callback
is sent at least once. A worker renews its reservation while it sends. Callbacks that the operator does not allow are
not sent, and the tasks that would have followed are answered with the error.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import redis
import structlog
from celery import Celery, signature
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError
from pydantic_core import from_json, to_json
from structlog.typing import FilteringBoundLogger

from shiwu.broker.answers import CALLBACKS_RESERVED_S
from shiwu.broker.chunks import chunks
from shiwu.broker.message_reader import Canvas, read_canvas
from shiwu.broker.redis_errors import info_of
from shiwu.broker.script_loader import load_script
from shiwu.contract import CANVAS, CANVAS_DUE, TASK_NAME, Answer, RequestError, Status, check_id, result_key
from shiwu.errors import JobFailed
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.runtime.threads import ServiceThread

log: FilteringBoundLogger = structlog.get_logger()
POLL_EVERY_S: Final = 5.0
CHUNK_SIZE: Final = 100
GENERATION_MARK: Final = b"\xff"
"""Stands between id and generation in the name of a record; no UTF-8 text contains it."""
UNAVAILABLE_ERRORS: Final = (redis.RedisError, OperationalError, OSError)
"""Errors of Redis and of the connection to it."""


class CallbackSender:
    """Sends callbacks on its own thread, from `start` to `close`.

    Args:
        app: a Celery app whose broker and result backend are the Redis of the worker; `CallbackApp` also checks what
            it sends.
        rules: which tasks and queues callbacks may name. Jobs that no worker answered were not checked before.
        retry_after_s: after this time another worker may send a chunk that this worker has taken.
        shard: index of the shard whose jobs have the callbacks; `app` and `client` are those of this shard.
    """

    def __init__(
        self,
        app: Celery,
        client: redis.Redis,
        *,
        rules: CallbackRules,
        retry_after_s: float = CALLBACKS_RESERVED_S,
        shard: int = 0,
    ) -> None:
        self._app = app
        self._client = client
        self._rules = rules
        self._retry_after_ms = int(retry_after_s * 1000)
        self._hold_after_s = retry_after_s / 3
        self._take = load_script(client, "take_callbacks")
        self._hold = load_script(client, "hold_callbacks")
        self._drop = load_script(client, "drop_callbacks")
        self._answered: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._taken = 0
        """Jobs of the chunk that is being sent."""
        name = f"callbacks-{shard}" if shard else "callbacks"
        self._thread = ServiceThread(name, self._run, on_fatal=None, stop=self._stop)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, committed: Sequence[CommittedJob]) -> None:
        """Queue the jobs of a commit. Never blocks."""
        if members := [
            canvas_member(item.entry.id, item.entry.generation)
            for item in committed
            if item.job.has_callbacks and item.is_first
        ]:
            self._answered.put(members)

    def ask_to_end(self) -> None:
        """Let the thread end once it has sent what is queued, without waiting for it."""
        self._thread.ask_to_end()

    def close(self, *, timeout_s: float) -> None:
        """Send what is queued, within `timeout_s`; another worker sends the rest."""
        self._thread.close(timeout_s)

    def _stop(self) -> None:
        self._closed.set()
        self._answered.put([])  # wakes the thread

    def _run(self) -> None:
        next_poll_s = time.monotonic() + POLL_EVERY_S
        while True:
            try:
                left_s = max(0.0, next_poll_s - time.monotonic())
                members = self._answered.get(timeout=left_s if not self._closed.is_set() else 0.01)
            except queue.Empty:
                members = []
            if not members and self._closed.is_set():
                return
            try:
                for portion in chunks(members, CHUNK_SIZE):
                    self._send_chunk(portion)
                # Also under load: callbacks that other workers left are sent by polling only.
                if time.monotonic() >= next_poll_s:
                    next_poll_s = time.monotonic() + POLL_EVERY_S
                    if self._send_chunk([]) == CHUNK_SIZE:
                        next_poll_s = 0.0  # more are waiting, for example after thousands of jobs were cancelled
            except UNAVAILABLE_ERRORS as error:
                # They stay in Redis, and a worker takes them after `retry_after_s`. Without jobs there is no line,
                # because other threads log that Redis does not answer.
                if jobs := max(len(members), self._taken):
                    log.warning("callbacks_postponed", jobs=jobs, error=str(error)[:300])

    def _send_chunk(self, members: Sequence[bytes]) -> int:
        """Send these callbacks, or without members those that other workers left; return the number of jobs."""
        self._taken = 0
        reserved_s = time.monotonic()
        reply: Any = self._take(keys=[CANVAS, CANVAS_DUE], args=[self._retry_after_ms, CHUNK_SIZE, *members])
        reservation, records = reply[0], dict(zip(reply[1::2], reply[2::2], strict=True))
        self._taken = len(records)
        left = list(records)
        while left:
            # Asked before each send, so that a slow Redis does not let another sender take what is sent here.
            if time.monotonic() - reserved_s >= self._hold_after_s:
                reserved_s = time.monotonic()
                reservation, *left = self._hold(keys=[CANVAS_DUE], args=[reservation, self._retry_after_ms, *left])
            if left:
                self._send_and_drop(left[0], records[left.pop(0)])
        return len(records)

    def _send_and_drop(self, member: bytes, record: bytes) -> None:
        job_id = member.partition(GENERATION_MARK)[0].decode(
            errors="replace"
        )  # a foreign member must not end this thread
        try:
            self._send(job_id, record)
        except Exception as error:  # border: signatures come from producers; a bad one must not be tried again
            if isinstance(error, UNAVAILABLE_ERRORS) and _is_temporary(error):
                raise
            log.error("callbacks_failed", id=job_id, kind=type(error).__name__, error=str(error)[:300])
        digest = hashlib.sha1(record, usedforsecurity=False).hexdigest()
        self._drop(keys=[CANVAS, CANVAS_DUE], args=[member, digest])

    def _send(self, job_id: str, record: bytes) -> None:
        length, _, rest = record.partition(b"|")
        raw_answer, message = rest[: int(length)], rest[int(length) :]
        answer = Answer.from_json(raw_answer)
        try:
            canvas = read_canvas(message.partition(b"|")[2])
        except RequestError as error:
            log.error("callbacks_failed", id=job_id, kind=error.code.value, error=str(error)[:300])
            return
        try:
            self._rules.check(canvas)
        except RequestError as error:
            log.error("callbacks_refused", id=job_id, code=error.code.value, error=str(error)[:600])
            chord = () if canvas.chord is None else (canvas.chord,)
            self._fail([*chord, *canvas.chain], JobFailed(f"{error.code}: {error}"), "FAILURE")
            return
        if answer.status is Status.TAGGED:
            children = self._on_success(job_id, canvas, from_json(raw_answer))
            if children:
                self._note_children(job_id, children)
        else:
            self._on_failure(job_id, canvas, answer)

    def _on_success(self, job_id: str, canvas: Canvas, value: object) -> list[Any]:
        """Do what celery.app.trace does after a task has returned. Return the results of the callbacks."""
        origin = {"parent_id": job_id, "root_id": canvas.root_id or job_id}
        sent = [signature(callback, app=self._app).apply_async((value,), **origin) for callback in canvas.callbacks]
        if canvas.chain:
            rest = list(canvas.chain)
            sent.append(signature(rest.pop(), app=self._app).apply_async((value,), chain=rest, **origin))
        if canvas.chord:
            self._app.backend.on_chord_part_return(_context(job_id, canvas), "SUCCESS", value)
        return [result.as_tuple() for result in sent]

    def _on_failure(self, job_id: str, canvas: Canvas, answer: Answer) -> None:
        """Do what celery.app.trace does after a task has raised. The rest of the chain fails with the same error."""
        is_revoked = answer.status in {Status.EXPIRED, Status.CANCELLED}
        text = f"{answer.error.code}: {answer.error.message}" if answer.error else str(answer.status)
        error: Exception = TaskRevokedError(str(answer.status)) if is_revoked else JobFailed(text)
        state = "REVOKED" if is_revoked else "FAILURE"
        backend = self._app.backend
        self._fail(canvas.chain, error, state)
        # As in Celery, a task that was revoked does not call its errbacks.
        backend.mark_as_failure(
            job_id,
            error,
            request=_context(job_id, canvas),
            store_result=False,
            call_errbacks=not is_revoked,
            state=state,
        )

    def _fail(self, followers: Sequence[dict[str, Any]], error: Exception, state: str) -> None:
        """Store a result for tasks that will not run, so that their callers do not wait forever."""
        if (left := len(followers) - self._rules.max_tasks) > 0:
            log.error(
                "chain_tasks_not_answered", jobs=left, meaning="their chain is longer than SHIWU_CALLBACK_MOST allows"
            )
        for follower in followers[: self._rules.max_tasks]:
            options = follower.get("options")
            with suppress(RequestError):  # the id becomes a key; an id that cannot is skipped
                task_id = check_id(options.get("task_id") if isinstance(options, dict) else None)
                self._app.backend.store_result(task_id, error, state)

    def _note_children(self, job_id: str, children: Sequence[Any]) -> None:
        key = result_key(job_id)
        if (raw := self._client.get(key)) is not None:
            meta = from_json(raw) | {"children": children}
            self._client.set(key, to_json(meta), xx=True, keepttl=True)


def canvas_member(job_id: str, generation: int) -> bytes:
    """The name under which the commit stores the callbacks of a job."""
    return job_id.encode() + (GENERATION_MARK + b"%d" % generation if generation else b"")


def _is_temporary(error: BaseException) -> bool:
    """Return whether another try may succeed. Otherwise the callback would be retried forever and block the others."""
    cause = error.__cause__ if isinstance(error, OperationalError) else error
    if isinstance(cause, redis.DataError):
        return False  # the client cannot encode such a value
    return cause is None or not info_of(cause).is_about_command


def _context(job_id: str, canvas: Canvas) -> Context:
    return Context(
        id=job_id,
        task=TASK_NAME,
        root_id=canvas.root_id or job_id,
        group=canvas.group,
        group_index=canvas.group_index,
        chord=canvas.chord,
        chain=list(canvas.chain) or None,
        errbacks=list(canvas.errbacks) or None,
        callbacks=None,
        delivery_info={},
        args=(),
        kwargs={},
    )
