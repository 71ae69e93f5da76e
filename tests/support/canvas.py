"""What a canvas has to do: an application without shiwu's code, on one server or in a shard of a cluster."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

from shiwu import Client
from shiwu.contract import ErrorCode, Lane
from tests.support.plain_app import NOTES
from tests.support.processes import Process, clean_environment
from tests.support.waiting import wait_until

GET_S: Final = 30


def plain_worker(module: str, *, folder: Path, env: Mapping[str, str]) -> Process:
    """An ordinary Celery worker of the application in this module; `ready.` in its log says that it reads its queue."""
    # Without -Q it would also read, after a lost connection, the queues that it has sent to.
    options = ["worker", "-P", "solo", "-l", "INFO", "-Q", "celery"]
    command = [sys.executable, "-m", "celery", "-A", module, *options]
    return Process(command, name="plain", folder=folder, env=clean_environment(env))


@dataclass(frozen=True)
class Plain:
    """A user's application: signatures by name, as written without shiwu's code."""

    app: Celery
    client: redis.Redis
    task: str
    good: str
    other: str
    missing: str
    url: str

    def tag(self, image: str | None = None, **options: Any) -> Any:
        """A signature of the task under test; without an image it takes the result before it."""
        queue = {"queue": Lane.BULK.queue} if self.task == "shiwu.tag" else {}
        return self.app.signature(self.task, args=[image] if image else [], **queue, **options)

    def then(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A signature of one of the application's own tasks."""
        return self.app.signature(f"plain.{name}", args=args, kwargs=kwargs, app=self.app)

    def notes(self) -> list[str]:
        """Notes that the application's tasks wrote."""
        found: Any = self.client.lrange(NOTES, 0, -1)
        return [text.decode() for text in found]


def chain_into_the_task(plain: Plain) -> None:
    """The result of the task before is the reference."""
    result = chain(plain.then("reference", plain.good), plain.tag(), plain.then("best")).apply_async()
    assert result.get(timeout=GET_S) == f"tagged {plain.good}"


def answers_of_a_group(plain: Plain) -> None:
    """Results in the order asked."""
    result = group(plain.tag(plain.good), plain.tag(plain.other), plain.tag(plain.good)).apply_async()
    answers = result.get(timeout=GET_S)
    assert [answer["image"]["reference"] for answer in answers] == [plain.good, plain.other, plain.good]


def body_of_a_chord(plain: Plain) -> None:
    """The body gets every answer, in order, once."""
    result = chord([plain.tag(plain.good), plain.tag(plain.other)], plain.then("gather")).apply_async()
    assert result.get(timeout=GET_S) == [plain.good, plain.other]


def chord_with_a_failing_header(plain: Plain) -> None:
    """The body never runs; its result is an error."""
    result = chord([plain.tag(plain.good), plain.tag(plain.missing)], plain.then("gather")).apply_async()
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)


def links_and_children(plain: Plain) -> None:
    """Every link is called with the answer, once; its result is a child."""
    result = plain.tag(plain.good).apply_async(
        link=[plain.then("note", "first"), plain.then("note", "second")],
    )
    assert result.get(timeout=GET_S)["status"] == "tagged"
    wait_until(lambda: len(plain.notes()) == 2, timeout_s=GET_S)
    assert sorted(plain.notes()) == ["first tagged", "second tagged"]
    wait_until(lambda: len(plain.app.AsyncResult(result.id).children or []) >= 1, timeout_s=GET_S)


def link_error(plain: Plain) -> None:
    """The errback gets the id of the task that failed; the link is not called."""
    result = plain.tag(plain.missing).apply_async(link=plain.then("note", "never"), link_error=plain.then("note_error"))
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)
    wait_until(lambda: plain.notes() == [f"error {result.id}"], timeout_s=GET_S)


def chain_fails_with_its_first_task(plain: Plain) -> None:
    """Later tasks of the chain fail too, so that no caller waits forever."""
    result = chain(plain.tag(plain.missing), plain.then("best"), plain.then("reference")).apply_async()
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)
    wait_until(lambda: result.state == "FAILURE", timeout_s=GET_S)
    if plain.task == "shiwu.tag":
        with Client(plain.url) as client:
            follower = wait_until(lambda: client.answer(result.id), timeout_s=GET_S, what="the answer of the follower")
        assert follower is not None
        assert follower.error is not None
        assert follower.error.code is ErrorCode.CHAIN_FAILED
        assert "source_not_found" in follower.error.message


CANVASES: Final[Mapping[str, Callable[[Plain], None]]] = MappingProxyType(
    {
        check.__name__: check
        for check in (
            chain_into_the_task,
            answers_of_a_group,
            body_of_a_chord,
            chord_with_a_failing_header,
            links_and_children,
            link_error,
            chain_fails_with_its_first_task,
        )
    }
)


def check_revoke_of_a_waiting_task(plain: Plain) -> None:
    """`AsyncResult.revoke()` revokes a job with a countdown immediately, as in Celery."""
    app, client = plain.app, plain.client
    result = app.send_task("shiwu.tag", args=[plain.good], queue=Lane.BULK.queue, countdown=300)
    wait_until(lambda: client.zscore("shiwu:delayed", result.id), timeout_s=GET_S)
    result.revoke()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=GET_S)
    assert app.AsyncResult(result.id).state == "REVOKED"
    foreign = "task-of-another-application"
    app.control.revoke(foreign)
    wait_until(lambda: client.zscore("shiwu:revoked", foreign), timeout_s=GET_S)
    assert client.exists(f"celery-task-meta-{foreign}") == 0, "a foreign task's result was touched"


def check_task_events(plain: Plain, watching_app: Celery) -> None:
    """With -E, Celery's own receiver sees each job received, started and ended, with its runtime."""
    events: list[dict[str, Any]] = []
    done = threading.Event()
    listening = threading.Event()

    def take(event: dict[str, Any]) -> None:
        listening.set()
        if event.get("uuid") in {"event-good", "event-missing"}:
            events.append(event)
            if sum(event["type"] in {"task-succeeded", "task-failed"} for event in events) == 2:
                done.set()

    def listen() -> None:
        with watching_app.connection_for_read() as connection:
            receiver = watching_app.events.Receiver(connection, handlers={"*": take})
            for _ in receiver.itercapture(limit=None, timeout=20, wakeup=False):
                if done.is_set():
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listening.wait(GET_S), "no heartbeat came"
    for name, reference in (("good", plain.good), ("missing", plain.missing)):
        plain.app.send_task("shiwu.tag", args=[reference], queue=Lane.BULK.queue, task_id=f"event-{name}")
    assert done.wait(GET_S), events
    thread.join(GET_S)
    for name, last in (("good", "task-succeeded"), ("missing", "task-failed")):
        mine = [event for event in events if event["uuid"] == f"event-{name}"]
        assert [event["type"] for event in mine] == ["task-received", "task-started", last]
