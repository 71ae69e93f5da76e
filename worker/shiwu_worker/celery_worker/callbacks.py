"""Celery's canvas: what a message's link, link_error, chain and chord ask for, once its job has its answer.

The commit leaves the callbacks of a job in Redis, in the same step as the answer. A thread sends them by Celery's own
functions and only then forgets them; those of a worker that died in between are sent by another. So a callback is sent
once, or again where a worker died at that moment: never not at all. What the operator did not allow is not sent, and
whoever waits for what follows is told so.
"""

from __future__ import annotations

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

from shiwu.broker.answers import CALLBACKS_RESERVED_S
from shiwu.broker.chunks import chunks
from shiwu.broker.message_reader import Canvas, read_canvas
from shiwu.broker.redis_errors import info_of
from shiwu.broker.script_loader import load_script
from shiwu.contract import CANVAS, CANVAS_DUE, TASK_NAME, Answer, RequestError, Status, check_id, result_key
from shiwu.errors import JobFailed
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.policy.callback_rules import CallbackRules

log: Any = structlog.get_logger()
POLL_EVERY_S: Final = 5.0
CHUNK_SIZE: Final = 100
UNAVAILABLE_ERRORS: Final = (redis.RedisError, OperationalError, OSError)
"""What Redis, or the way to it, raises."""


class CallbackSender:
    """Sends callbacks from `start` to `close`.

    Args:
        app: a Celery app whose broker and result backend are our Redis; a `CallbackApp` judges what it sends itself.
        rules: which tasks and queues callbacks may name. Jobs that were answered aside have not been judged before.
        retry_after_s: how long one portion is ours; then another worker may send it.
    """

    def __init__(
        self, app: Celery, client: redis.Redis, *, rules: CallbackRules, retry_after_s: float = CALLBACKS_RESERVED_S
    ) -> None:
        self._app = app
        self._client = client
        self._rules = rules
        self._retry_after_ms = int(retry_after_s * 1000)
        self._take = load_script(client, "take_callbacks")
        self._fresh: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._under_way = 0
        """Jobs of the portion that is being sent."""
        self._thread = threading.Thread(target=self._run, name="callbacks", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, settled: Sequence[CommittedJob]) -> None:
        """Take jobs that have their answers. Never blocks."""
        if ids := [one.entry.id for one in settled if one.job.has_callbacks and one.is_first]:
            self._fresh.put(ids)

    def close(self, *, timeout_s: float) -> None:
        """Send what was put, for `timeout_s` at most; the rest is another worker's."""
        self._closed.set()
        self._fresh.put([])  # wakes it
        self._thread.join(timeout_s)

    def _run(self) -> None:
        look_s = time.monotonic() + POLL_EVERY_S
        while True:
            try:
                left_s = max(0.0, look_s - time.monotonic())
                ids = self._fresh.get(timeout=left_s if not self._closed.is_set() else 0.01)
            except queue.Empty:
                ids = []
            if not ids and self._closed.is_set():
                return
            try:
                for portion in chunks(ids, CHUNK_SIZE):
                    self._portion(portion)
                # By the clock, however much there is of our own: others' callbacks wait for nobody else.
                if time.monotonic() >= look_s:
                    look_s = time.monotonic() + POLL_EVERY_S
                    if self._portion([]) == CHUNK_SIZE:
                        look_s = 0.0  # thousands of jobs cancelled at once leave more than one portion
            except UNAVAILABLE_ERRORS as error:
                # They stay in Redis, and a worker finds them when the patience is over. Where none are concerned, other
                # threads have logged that Redis is away.
                if jobs := max(len(ids), self._under_way):
                    log.warning("callbacks_postponed", jobs=jobs, error=str(error)[:300])

    def _portion(self, ids: Sequence[str]) -> int:
        """Send what these ids, or with none of them others, have left; gives how many there were."""
        self._under_way = 0
        reply: Any = self._take(keys=[CANVAS, CANVAS_DUE], args=[self._retry_after_ms, CHUNK_SIZE, *ids])
        self._under_way = len(reply) // 2
        for i in range(0, len(reply), 2):
            job_id = reply[i].decode(errors="replace")  # a member by another hand must not end this thread
            try:
                self._send(job_id, reply[i + 1])
            except Exception as error:  # border: signatures are a stranger's; a bad one must not come back
                if isinstance(error, UNAVAILABLE_ERRORS) and _passes(error):
                    raise
                log.error("callbacks_failed", id=job_id, kind=type(error).__name__, error=str(error)[:300])
            with self._client.pipeline(transaction=True) as pipe:
                pipe.hdel(CANVAS, reply[i])
                pipe.zrem(CANVAS_DUE, reply[i])
                pipe.execute()
        return len(reply) // 2

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

    def _on_success(self, job_id: str, canvas: Canvas, value: Any) -> list[Any]:
        """What celery.app.trace does after a task's function has returned; gives the results that it led to."""
        origin = {"parent_id": job_id, "root_id": canvas.root_id or job_id}
        sent = [signature(one, app=self._app).apply_async((value,), **origin) for one in canvas.callbacks]
        if canvas.chain:
            rest = list(canvas.chain)
            sent.append(signature(rest.pop(), app=self._app).apply_async((value,), chain=rest, **origin))
        if canvas.chord:
            self._app.backend.on_chord_part_return(_context(job_id, canvas), "SUCCESS", value)
        return [one.as_tuple() for one in sent]

    def _on_failure(self, job_id: str, canvas: Canvas, answer: Answer) -> None:
        """The same after it has raised. Our own result is there already; what follows in a chain fails with us."""
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
        """Answer for tasks that will not run, so that nobody waits for them for ever."""
        if (left := len(followers) - self._rules.max_tasks) > 0:
            log.error(
                "chain_tasks_not_answered", jobs=left, meaning="their chain is longer than SHIWU_CALLBACK_MOST allows"
            )
        for one in followers[: self._rules.max_tasks]:
            options = one.get("options")
            with suppress(RequestError):  # the id becomes a key; what can't be one is nobody's
                follower = check_id(options.get("task_id") if isinstance(options, dict) else None)
                self._app.backend.store_result(follower, error, state)

    def _note_children(self, job_id: str, children: Sequence[Any]) -> None:
        key = result_key(job_id)
        if (raw := self._client.get(key)) is not None:
            meta = from_json(raw) | {"children": children}
            self._client.set(key, to_json(meta), xx=True, keepttl=True)


def _passes(error: BaseException) -> bool:
    """Whether the same may succeed later. Else it would come back for ever, and those behind it would never be sent."""
    cause = error.__cause__ if isinstance(error, OperationalError) else error
    if isinstance(cause, redis.DataError):
        return False  # the client itself can't write such a value
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
