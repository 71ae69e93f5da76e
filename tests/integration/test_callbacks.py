"""Celery's canvas over shiwu.tag, from a Celery application without shiwu's code.

Each canvas runs twice: with `shiwu.tag`, and with an ordinary Celery task. The outcomes must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery, chain, chord

from shiwu import Client
from shiwu.contract import CANVAS, CANVAS_DUE, Lane
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.canvas import CANVASES, GET_S, Plain, check_revoke_of_a_waiting_task, check_task_events, plain_worker
from tests.support.celery_client import celery_client
from tests.support.plain_app import NOTES
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Celery's own use of redis


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
        plain_worker("tests.support.plain_app", folder=folder, env={"PLAIN_REDIS_URL": server.url}) as plain,
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
    with opened(servers, app, request.param) as application:
        yield application


@pytest.fixture
def plain_tag(servers: tuple[Valkey, Path], app: Celery) -> Iterator[Plain]:
    """The application, with `shiwu.tag` only."""
    with opened(servers, app, "shiwu.tag") as application:
        yield application


@contextmanager
def opened(servers: tuple[Valkey, Path], app: Celery, task: str) -> Iterator[Plain]:
    """The application, with one of the tasks."""
    server, folder = servers
    with server.client() as client:
        client.delete(NOTES)
        good, other, missing = ((folder / f"{name}.png").as_uri() for name in ("good", "other", "missing"))
        yield Plain(app, client, task, good, other, missing, server.url)


@pytest.mark.parametrize("name", CANVASES)
def test_canvas(plain: Plain, name: str) -> None:
    """What is shared with the tests of applications in a shard of a cluster."""
    CANVASES[name](plain)


def test_chain(plain: Plain) -> None:
    """The answer is the first argument of the next task."""
    result = chain(plain.tag(plain.good), plain.then("best")).apply_async()
    assert result.get(timeout=GET_S) == f"tagged {plain.good}"


def test_chain_with_a_chord_behind_the_task(plain: Plain) -> None:
    """tag → (two tasks) → body."""
    best = plain.then("best")
    body = plain.app.signature("plain.reference", args=["done"], immutable=True)
    result = chain(plain.tag(plain.good), chord([best, best], body)).apply_async()
    assert result.get(timeout=GET_S) == "done"


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


def test_revoke_of_a_waiting_task(plain_tag: Plain) -> None:
    """`AsyncResult.revoke()` revokes a job with a countdown immediately, as in Celery."""
    check_revoke_of_a_waiting_task(plain_tag)


def test_one_revoke_names_thousands(servers: tuple[Valkey, Path], app: Celery) -> None:
    """Every id of the broadcast is revoked, for any number."""
    ids = [f"thousands-{number}" for number in range(2500)]
    with servers[0].client() as client:
        app.control.revoke([*ids, "~" + "0" * 40])
        wait_until(lambda: None not in client.zmscore("shiwu:revoked", ids), timeout_s=GET_S)


def test_task_events(plain_tag: Plain) -> None:
    """With -E, Celery's own receiver sees each job received, started and ended, with its runtime."""
    check_task_events(plain_tag, plain_tag.app)


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
