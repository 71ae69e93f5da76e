"""Celery's canvas over shiwu.tag, from a Celery application without shiwu's code.

Each canvas runs twice: with `shiwu.tag`, and with an ordinary Celery task. The outcomes must be equal.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

from shiwu import Client
from shiwu.contract import CANVAS, CANVAS_DUE, ErrorCode, Lane
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.plain_app import NOTES
from tests.support.processes import Process, clean_environment
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Celery's own use of redis
GET_S = 30


@dataclass(frozen=True)
class Plain:
    """A user's application: signatures by name, as written without shiwu's code."""

    app: Celery
    client: redis.Redis
    task: str
    good: str
    other: str
    missing: str

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


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Valkey, Path]]:
    """A Redis, a worker of shiwu and an ordinary Celery worker."""
    folder = tmp_path_factory.mktemp("canvas")
    for number, name in enumerate(("good", "other")):
        (folder / f"{name}.png").write_bytes(pictures.png(pictures.picture().resize((40 + number, 40))))
    with (
        Valkey(folder=folder / "valkey") as server,
        WorkerProcess(
            redis_url=server.url,
            folder=folder,
            by_celery=True,
            allow_folders=folder,
            callback_tasks="shiwu.tag,plain.*",
            celery_args="-E",
        ) as worker,
        Process(
            [sys.executable, "-m", "celery", "-A", "tests.support.plain_app", "worker", "-P", "solo", "-l", "INFO"],
            name="plain",
            folder=folder,
            env=clean_environment({"PLAIN_REDIS_URL": server.url}),
        ) as plain,
    ):
        worker.wait_ready()
        wait_until(lambda: "ready." in plain.log_text() or not plain.is_running, timeout_s=60)
        with server.client() as client:
            # A revoke is a broadcast: workers that are not subscribed yet miss it. The plain worker must be, too.
            pidbox = "_kombu.binding.celery.pidbox"
            wait_until(lambda: client.exists(pidbox) and client.pubsub_numpat() >= 2, timeout_s=30)
        yield server, folder


@pytest.fixture
def app(servers: tuple[Valkey, Path]) -> Iterator[Celery]:
    """A user's application on the server of both workers."""
    with celery_client(servers[0].url) as application:
        yield application


@pytest.fixture(params=["shiwu.tag", "plain.tag"])
def plain(request: pytest.FixtureRequest, servers: tuple[Valkey, Path], app: Celery) -> Iterator[Plain]:
    """The application, once for `shiwu.tag` and once for the ordinary task."""
    server, folder = servers
    with server.client() as client:
        client.delete(NOTES)
        good, other = ((folder / f"{name}.png").as_uri() for name in ("good", "other"))
        yield Plain(app, client, request.param, good, other, (folder / "missing.png").as_uri())


def test_chain(plain: Plain) -> None:
    """The answer is the first argument of the next task."""
    result = chain(plain.tag(plain.good), plain.then("best")).apply_async()
    assert result.get(timeout=GET_S) == f"tagged {plain.good}"


def test_chain_into_the_task(plain: Plain) -> None:
    """The result of the task before is the reference."""
    result = chain(plain.then("reference", plain.good), plain.tag(), plain.then("best")).apply_async()
    assert result.get(timeout=GET_S) == f"tagged {plain.good}"


def test_group(plain: Plain) -> None:
    """Results in the order asked."""
    result = group(plain.tag(plain.good), plain.tag(plain.other), plain.tag(plain.good)).apply_async()
    answers = result.get(timeout=GET_S)
    assert [answer["image"]["reference"] for answer in answers] == [plain.good, plain.other, plain.good]


def test_chord(plain: Plain) -> None:
    """The body gets every answer, in order, once."""
    result = chord([plain.tag(plain.good), plain.tag(plain.other)], plain.then("gather")).apply_async()
    assert result.get(timeout=GET_S) == [plain.good, plain.other]


def test_chain_with_a_chord_behind_the_task(plain: Plain) -> None:
    """tag → (two tasks) → body."""
    best = plain.then("best")
    body = plain.app.signature("plain.reference", args=["done"], immutable=True)
    result = chain(plain.tag(plain.good), chord([best, best], body)).apply_async()
    assert result.get(timeout=GET_S) == "done"


def test_chord_with_a_failing_header(plain: Plain) -> None:
    """The body never runs; its result is an error."""
    result = chord([plain.tag(plain.good), plain.tag(plain.missing)], plain.then("gather")).apply_async()
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)


def test_link(plain: Plain) -> None:
    """Every link is called with the answer, once; its result is a child."""
    result = plain.tag(plain.good).apply_async(
        link=[plain.then("note", "first"), plain.then("note", "second")],
    )
    assert result.get(timeout=GET_S)["status"] == "tagged"
    wait_until(lambda: len(plain.notes()) == 2, timeout_s=GET_S)
    assert sorted(plain.notes()) == ["first tagged", "second tagged"]
    wait_until(lambda: len(plain.app.AsyncResult(result.id).children or []) >= 1, timeout_s=GET_S)


def test_link_error(plain: Plain) -> None:
    """The errback gets the id of the task that failed; the link is not called."""
    result = plain.tag(plain.missing).apply_async(link=plain.then("note", "never"), link_error=plain.then("note_error"))
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)
    wait_until(lambda: plain.notes() == [f"error {result.id}"], timeout_s=GET_S)


def test_chain_fails_with_its_first_task(plain: Plain) -> None:
    """Later tasks of the chain fail too, so that no caller waits forever."""
    result = chain(plain.tag(plain.missing), plain.then("best"), plain.then("reference")).apply_async()
    with pytest.raises(Exception, match="source_not_found"):
        result.get(timeout=GET_S)
    wait_until(lambda: result.state == "FAILURE", timeout_s=GET_S)
    if plain.task == "shiwu.tag":
        with Client(plain.app.conf.broker_url) as client:
            follower = client.wait(result.id, timeout_s=GET_S)
        assert follower.error is not None
        assert follower.error.code is ErrorCode.CHAIN_FAILED
        assert "source_not_found" in follower.error.message


def test_ignore_result_still_calls_links(plain: Plain) -> None:
    """Nothing lies under the result key, and the link is called."""
    result = plain.tag(plain.good).apply_async(link=plain.then("note", "silent"), ignore_result=True)
    wait_until(lambda: plain.notes() == ["silent tagged"], timeout_s=GET_S)
    assert plain.client.exists(f"celery-task-meta-{result.id}") == 0


def test_forget(plain: Plain) -> None:
    """A forgotten result is gone and pending again."""
    result = plain.tag(plain.good).apply_async()
    result.get(timeout=GET_S)
    result.forget()
    assert plain.app.AsyncResult(result.id).state == "PENDING"


def test_revoke_of_a_waiting_task(servers: tuple[Valkey, Path], app: Celery) -> None:
    """`AsyncResult.revoke()` revokes a job with a countdown immediately, as in Celery."""
    server, folder = servers
    reference = (folder / "good.png").as_uri()
    result = app.send_task("shiwu.tag", args=[reference], queue=Lane.BULK.queue, countdown=300)
    with server.client() as client:
        wait_until(lambda: client.zscore("shiwu:delayed", result.id), timeout_s=GET_S)
        result.revoke()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=GET_S)
        assert app.AsyncResult(result.id).state == "REVOKED"
        foreign = "task-of-another-application"
        app.control.revoke(foreign)
        wait_until(lambda: client.zscore("shiwu:revoked", foreign), timeout_s=GET_S)
        assert client.exists(f"celery-task-meta-{foreign}") == 0, "a foreign task's result was touched"


def test_one_revoke_names_thousands(servers: tuple[Valkey, Path], app: Celery) -> None:
    """Every id of the broadcast is revoked, for any number."""
    ids = [f"thousands-{number}" for number in range(2500)]
    with servers[0].client() as client:
        app.control.revoke([*ids, "~" + "0" * 40])
        wait_until(lambda: None not in client.zmscore("shiwu:revoked", ids), timeout_s=GET_S)


def test_task_events(servers: tuple[Valkey, Path], app: Celery) -> None:
    """With -E, Celery's own receiver sees each job received, started and ended, with its runtime."""
    _, folder = servers
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
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": take})
            for _ in receiver.itercapture(limit=None, timeout=20, wakeup=False):
                if done.is_set():
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listening.wait(GET_S), "no heartbeat came"
    for name in ("good", "missing"):
        reference = (folder / f"{name}.png").as_uri()
        app.send_task("shiwu.tag", args=[reference], queue=Lane.BULK.queue, task_id=f"event-{name}")
    assert done.wait(GET_S), events
    thread.join(GET_S)
    for name, last in (("good", "task-succeeded"), ("missing", "task-failed")):
        mine = [event for event in events if event["uuid"] == f"event-{name}"]
        assert [event["type"] for event in mine] == ["task-received", "task-started", last]


def test_callbacks_of_a_crashed_worker_are_sent_by_another(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Unsent callbacks of an answer are kept in Redis; the next worker finds and sends them."""
    from shiwu.broker.answers import AnswerEntry, AnswerStore  # noqa: PLC0415 used only here
    from shiwu.contract import Answer, ImageInfo, Status  # noqa: PLC0415 beside their one use

    with celery_client(redis_url) as app:
        signature = app.signature("shiwu.tag", args=["file:///x.png"], queue=Lane.BULK.queue)
        job_id = signature.apply_async(link=app.signature("plain.note", args=["late"], queue="elsewhere")).id
    raw = redis_client.rpop(Lane.BULK.queue)
    assert isinstance(raw, bytes)
    answer = Answer(id=job_id, status=Status.TAGGED, image=ImageInfo(reference="file:///x.png"))
    dead = AnswerStore(redis_client, token="dead", callbacks_reserved_s=0.001)
    dead.write([AnswerEntry(answer=answer, id=job_id, message=b"shiwu.bulk|" + raw, has_callbacks=True)])
    start_worker(redis_url=redis_url, allow_folders=tmp_path, callback_tasks="plain.note", callback_queues="else*")
    wait_until(lambda: redis_client.llen("elsewhere") == 1, timeout_s=GET_S)
    wait_until(lambda: not redis_client.exists(CANVAS, CANVAS_DUE), timeout_s=GET_S)


@pytest.mark.parametrize("way", ["cancel", "revoke"])
def test_chord_and_chain_end_with_a_cancelled_job(servers: tuple[Valkey, Path], app: Celery, way: str) -> None:
    """No caller waits forever for a chord body or next task after a job with a countdown was cancelled."""
    server, folder = servers
    reference = (folder / "good.png").as_uri()
    tag = app.signature("shiwu.tag", args=[reference], queue=Lane.BULK.queue)
    late = tag.clone().set(countdown=300)
    body = app.signature("plain.gather", app=app)
    follower = app.signature("plain.best", app=app)
    all_of_them = chord([tag, late], body).apply_async()
    one_by_one = chain(late.clone(), follower).apply_async()
    [header] = [result.id for result in all_of_them.parent.results if result.id != all_of_them.parent.results[0].id]
    with server.client() as client, Client(server.url) as ours:
        for job_id in (header, one_by_one.parent.id):
            wait_until(partial(client.zscore, "shiwu:delayed", job_id), timeout_s=GET_S)
            if way == "cancel":
                assert ours.cancel(job_id) == [job_id]
            else:
                app.control.revoke(job_id)

        def state(job_id: str) -> str:
            raw: Any = client.get(f"celery-task-meta-{job_id}")
            return str(json.loads(raw)["status"]) if raw else ""

        wait_until(lambda: state(all_of_them.id) == "FAILURE", timeout_s=GET_S)
        wait_until(lambda: state(one_by_one.id) == "REVOKED", timeout_s=GET_S)
        assert client.hlen("shiwu:delayed:messages") == client.zcard("shiwu:delayed") == 0


@pytest.mark.parametrize("options", [{}, {"countdown": 300}], ids=["now", "later"])
@pytest.mark.parametrize(
    ("link", "code"),
    [
        ({"task": "theirs.task"}, "callback_refused"),
        ({"task": "plain.note", "options": {"queue": "shiwu:claims"}}, "callback_refused"),
        ({"task": "plain.note", "options": {"link_error": [{"task": "celery.map"}]}}, "callback_refused"),
        ({"task": "plain.note", "options": {"exchange": "celery.pidbox"}}, "unsupported_canvas"),
        ({"task": ["plain.note"]}, "malformed_message"),
    ],
    ids=["task", "queue", "nested", "exchange", "shape"],
)
def test_job_with_refused_callbacks_is_not_fetched(
    servers: tuple[Valkey, Path], app: Celery, link: dict[str, Any], code: str, options: dict[str, Any]
) -> None:
    """It is answered at its claim, though it were for later; nothing is fetched, and the message is a dead letter."""
    server, folder = servers
    follower = uuid4().hex
    chained = [link, {"task": "plain.best", "options": {"task_id": follower}}]
    result = app.send_task(
        "shiwu.tag",
        args=[(folder / "good.png").as_uri()],
        queue=Lane.BULK.queue,
        chain=chained,
        link=link,
        ignore_result=False,
        **options,
    )
    with server.client() as client, Client(server.url) as ours:
        answer = ours.wait(result.id, timeout_s=GET_S)
        assert answer.error is not None
        assert (answer.status, answer.error.code, answer.error.stage) == ("rejected", code, "claim")
        assert answer.image is None or answer.image.bytes is None
        assert answer.timing is not None
        assert answer.timing.fetch == 0
        assert client.hexists("shiwu:dead:messages", result.id)
        wait_until(lambda: app.AsyncResult(follower).state == "FAILURE", timeout_s=GET_S)
        wait_until(lambda: not client.exists(CANVAS, CANVAS_DUE), timeout_s=GET_S)
        assert client.llen("celery") == 0


def test_celery_tasks_in_the_admin_queue_are_not_run(servers: tuple[Valkey, Path], app: Celery) -> None:
    """`celery.group` would send any task; the worker does not know it, and goes on."""
    server, folder = servers
    evil = {"task": "theirs.task", "args": [], "kwargs": {}, "options": {"queue": "theirs"}}
    for name in ("celery.group", "celery.chord", "celery.map"):
        arguments = {"celery.group": ([evil], ["g", None], "g", []), "celery.chord": ([evil], evil)}
        app.send_task(name, args=arguments.get(name, (evil, [1])), queue="shiwu.admin", ignore_result=True)
    with server.client() as client:
        wait_until(lambda: not client.exists("shiwu.admin"), timeout_s=GET_S)
        result = app.send_task("shiwu.tag", args=[(folder / "good.png").as_uri()], queue=Lane.BULK.queue)
        assert result.get(timeout=GET_S)["status"] == "tagged"
        assert client.llen("theirs") == 0
        logs = [path.read_text() for path in folder.glob("*.log")]
        assert sum("unregistered task" in text for text in logs) == 1
