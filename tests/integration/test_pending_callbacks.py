"""Callbacks of jobs that another process answered, and of crashed workers: any worker sends them.

An ordinary Celery task shows what Celery does with a task that is revoked.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import structlog
from celery import Celery, chain, chord

from shiwu import Client
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.script_loader import load_script
from shiwu.contract import (
    ANSWER_BY_HEADER,
    CANVAS,
    CANVAS_DUE,
    DEADLINES,
    PENDING_ANSWERS,
    REVOKED,
    Answer,
    ImageInfo,
    Lane,
    Status,
)
from shiwu.errors import JobFailed
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.celery_worker.revoke import Revoker
from shiwu_worker.jobs.job import Release
from shiwu_worker.policy.callback_rules import CallbackRules
from tests.support.celery_client import celery_client
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import Process, clean_environment
from tests.support.redis_parts import make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Celery's own use of redis
GET_S = 30
RULES = CallbackRules(tasks=("plain.*",))
Ending = tuple[str, str, str]
"""States of a chord's revoked part and of its body, and the kind of the body's error."""


def ending(app: Celery, part: str, body: str) -> Ending:
    """How a chord ended."""
    wait_until(lambda: app.AsyncResult(body).ready(), timeout_s=GET_S, what="the end of the chord")
    found = app.AsyncResult(body)
    return app.AsyncResult(part).state, found.state, type(found.result).__name__


@pytest.fixture(scope="module")
def of_ordinary_task(tmp_path_factory: pytest.TempPathFactory) -> Ending:
    """What an ordinary Celery worker makes of a chord with a revoked part."""
    folder = tmp_path_factory.mktemp("ordinary")
    command = [sys.executable, "-m", "celery", "-A", "tests.support.plain_app", "worker", "-P", "solo"]
    with Valkey(folder=folder / "valkey") as server:
        env = clean_environment({"PLAIN_REDIS_URL": server.url})
        with Process(command, name="plain", folder=folder, env=env) as plain:
            with celery_client(server.url) as app:
                tag = app.signature("plain.tag", args=["x"])
                late = tag.clone().set(expires=datetime.now(UTC) - timedelta(hours=1))
                result = chord([tag, late], app.signature("plain.gather", app=app)).apply_async()
                found = ending(app, result.parent.results[1].id, result.id)
            plain.kill()
    return found


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """A user's Celery application on the server of the test."""
    with celery_client(redis_url) as application:
        yield application


@pytest.fixture
def callbacks(app: Celery, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker's thread that sends callbacks, and looks often."""
    monkeypatch.setattr("shiwu_worker.celery_worker.callbacks.POLL_EVERY_S", 0.1)
    running = CallbackSender(app, redis_client, rules=RULES)
    running.start()
    yield
    running.close(timeout_s=5)


def end_aside(client: redis.Redis, url: str, way: str, ids: list[str]) -> None:
    """Answer jobs without holding them."""
    if way == "cancel":
        with Client(url) as ours:
            assert ours.cancel(ids) == ids
    elif way == "revoke":
        assert Revoker(client, make_answer_store(client, "revoke")).revoke(ids) == len(ids)
    else:
        client.zadd(DEADLINES, dict.fromkeys(ids, 1.0))
        assert make_maintenance(client).run_once().out_of_time == len(ids)


@pytest.mark.usefixtures("callbacks")
@pytest.mark.parametrize(
    "how",
    [
        *(("cancel", where) for where in ("lane", "claimed", "delayed")),
        *(("revoke", where) for where in ("claimed", "delayed")),
        *(("answer_by", where) for where in ("lane", "claimed", "delayed")),
    ],
    ids="-".join,
)
def test_chord_and_chain_end_as_in_celery(
    app: Celery, redis_client: redis.Redis, redis_url: str, of_ordinary_task: Ending, how: tuple[str, str]
) -> None:
    """No caller waits forever for a chord body or the next task, wherever the message of the ended job was."""
    way, where = how
    headers = {ANSWER_BY_HEADER: 1.0} if way == "answer_by" else {}
    tag: Any = app.signature("shiwu.tag", args=["s3://b/k.jpg"], queue=Lane.BULK.queue, headers=headers)
    whole = chord([tag, tag.clone()], app.signature("plain.gather", app=app)).apply_async()
    line = chain(tag.clone(), app.signature("plain.best", app=app)).apply_async()
    tagged, part = [result.id for result in whole.parent.results]
    ended = [part, line.parent.id]
    claims = make_lease_queue(redis_client, "w")
    jobs = claims.claim(1 if where == "lane" else 3).jobs
    assert jobs[0].id == tagged
    if where == "delayed":
        assert claims.release([Release(job_id, delay_s=300) for job_id in ended]) == 2
    record = Answer(id=tagged, status=Status.TAGGED, image=ImageInfo(reference="s3://b/k.jpg"))
    entry = AnswerEntry(answer=record, id=tagged, message=b"shiwu.bulk|" + jobs[0].raw, has_callbacks=True)
    AnswerStore(redis_client, token="w", callbacks_reserved_s=0.0).write([entry])
    end_aside(redis_client, redis_url, way, ended)
    assert claims.claim(5).jobs == ()
    assert ending(app, part, whole.id) == of_ordinary_task
    wait_until(lambda: app.AsyncResult(line.id).state == "REVOKED", timeout_s=GET_S)
    wait_until(lambda: not redis_client.exists(CANVAS, CANVAS_DUE), timeout_s=GET_S)
    assert not redis_client.exists(PENDING_ANSWERS)


def linked(job_id: str, *, ignore_result: bool = False) -> bytes:
    """A message as Celery writes it, with a callback."""
    raw = json.loads(message(job_id, Lane.BULK))
    args, kwargs, embed = json.loads(base64.b64decode(raw["body"]))
    embed["callbacks"] = [{"task": "plain.note", "args": ["x"], "kwargs": {}, "options": {}}]
    raw["body"] = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    raw["headers"]["ignore_result"] = ignore_result
    return json.dumps(raw).encode()


@pytest.mark.parametrize("where", ["lane", "claimed", "delayed", "nowhere"])
def test_answer_without_a_worker_keeps_the_callbacks(redis_client: redis.Redis, redis_url: str, where: str) -> None:
    """Wherever the message is, its callbacks are to be sent by the next worker that looks, once."""
    raw = linked("job", ignore_result=where == "claimed")
    claims = make_lease_queue(redis_client, "w")
    if where != "nowhere":
        redis_client.lpush(Lane.BULK.queue, raw)
    if where in {"claimed", "delayed"}:
        assert len(claims.claim(1).jobs) == 1
    if where == "delayed":
        claims.release([Release("job", delay_s=300)])
    with Client(redis_url) as client:
        client.cancel("job")
    assert redis_client.exists("celery-task-meta-job") == (where != "claimed")
    assert claims.claim(1, held=[]).jobs == ()
    expected = [] if where == "nowhere" else [b"job"]
    assert redis_client.hkeys(CANVAS) == expected
    take = load_script(redis_client, "take_callbacks")
    taken = take(keys=[CANVAS, CANVAS_DUE], args=[1000, 10])[1:]
    assert taken[:1] == expected
    assert all(record.endswith(f"{Lane.BULK.queue}|".encode() + raw) for record in taken[1:])
    assert claims.claim(1).jobs == ()
    assert redis_client.hlen("shiwu:delayed:messages") == redis_client.hlen("shiwu:claims") == 0


def test_full_redis_still_sends_callbacks_and_revokes(valkey: Valkey) -> None:
    """Scripts that begin with a write that needs memory are denied; these begin with one that does not."""
    with valkey.client() as client:
        client.hset(CANVAS, "job", b"2|{}shiwu.bulk|x")
        client.zadd(CANVAS_DUE, {"job": 1.0})
        take, revoke = load_script(client, "take_callbacks"), load_script(client, "revoke")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        assert take(keys=[CANVAS, CANVAS_DUE], args=[1000, 10])[1:] == [b"job", b"2|{}shiwu.bulk|x"]
        assert revoke(keys=["shiwu:claims", "shiwu:delayed:messages", "shiwu:revoked"], args=[1000, 10, "other"]) == [0]
        client.config_set("maxmemory", 0)


def test_callbacks_of_others_are_sent_under_load(app: Celery, redis_client: redis.Redis) -> None:
    """While a worker has a steady flow of callbacks, those of a crashed worker are sent too."""
    callbacks = CallbackSender(app, redis_client, rules=RULES)
    sent: list[str] = []
    callbacks._send = lambda job_id, record: sent.append(job_id)  # type: ignore[method-assign]  # no broker here
    redis_client.hset(CANVAS, "left", "x")
    redis_client.zadd(CANVAS_DUE, {"left": 1.0})
    callbacks.start()

    def goes_on() -> bool:
        callbacks._answered.put([b"own"])
        return "left" in sent

    wait_until(goes_on, timeout_s=20, every_s=0.05)
    callbacks.close(timeout_s=5)


def test_many_pending_callbacks_are_sent_without_pauses(app: Celery, redis_client: redis.Redis) -> None:
    """A look goes on until nothing is left; at a portion for each look this would take more than a minute."""
    redis_client.hset(CANVAS, mapping={f"job-{n}": "x" for n in range(1500)})
    redis_client.zadd(CANVAS_DUE, {f"job-{n}": 1.0 for n in range(1500)})
    callbacks = CallbackSender(app, redis_client, rules=RULES)
    callbacks._send = lambda job_id, record: None  # type: ignore[method-assign]  # no broker here
    callbacks.start()
    wait_until(lambda: redis_client.hlen(CANVAS) == 0, timeout_s=30)
    callbacks.close(timeout_s=5)


def test_broken_connection_postpones_the_callbacks(app: Celery, redis_client: redis.Redis) -> None:
    """A plain OSError, which not every library wraps, is retried; a malformed message is not."""
    redis_client.hset(CANVAS, mapping={"bad": "x", "good": "x"})
    redis_client.zadd(CANVAS_DUE, {"bad": 1.0, "good": 2.0})
    callbacks = CallbackSender(app, redis_client, rules=RULES, retry_after_s=0.001)
    faults: list[Exception] = [ValueError("no signature"), BrokenPipeError("gone")]
    sent: list[str] = []

    def send(job_id: str, record: bytes) -> None:
        if faults:
            raise faults.pop(0)
        sent.append(job_id)

    callbacks._send = send  # type: ignore[method-assign]  # no broker here
    with pytest.raises(BrokenPipeError):
        callbacks._send_chunk([])
    assert redis_client.hkeys(CANVAS) == [b"good"]
    wait_until(lambda: callbacks._send_chunk([]) == 1, timeout_s=5)
    assert sent == ["good"]


def test_chain_tasks_over_the_limit_are_logged(app: Celery, redis_client: redis.Redis) -> None:
    """A chain that is longer than the operator allows: the first ones get an answer, the log counts the others."""
    rules = CallbackRules(tasks=("plain.*",), max_tasks=2)
    callbacks = CallbackSender(app, redis_client, rules=rules)
    chain_ = [{"task": "plain.best", "options": {"task_id": f"follower-{number}"}} for number in range(5)]
    with structlog.testing.capture_logs() as logs:
        callbacks._fail(chain_, JobFailed("no"), "FAILURE")
    assert [(line["event"], line["jobs"]) for line in logs] == [("chain_tasks_not_answered", 3)]
    assert app.AsyncResult("follower-1").state == "FAILURE"


def test_callback_record_without_a_job_is_deleted(app: Celery, redis_client: redis.Redis) -> None:
    """A member that is no text neither ends the thread nor comes back each time."""
    redis_client.hset(CANVAS, b"\xff\xfe", "x")
    redis_client.zadd(CANVAS_DUE, {b"\xff\xfe": 1.0})
    assert CallbackSender(app, redis_client, rules=RULES)._send_chunk([]) == 1
    assert redis_client.exists(CANVAS, CANVAS_DUE) == 0


def test_canvas_key_of_a_wrong_type_stops_the_claim(redis_client: redis.Redis, redis_url: str) -> None:
    """The claim writes there too, and Redis does not undo a script."""
    redis_client.lpush(Lane.BULK.queue, linked("job"))
    with Client(redis_url) as client:
        client.cancel("job")
    for key in (CANVAS, CANVAS_DUE, REVOKED):
        redis_client.set(key, "oops")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            make_lease_queue(redis_client, "w").claim(5)
        redis_client.delete(key)
    assert redis_client.llen(Lane.BULK.queue) == 1


def test_two_slow_senders_send_each_callback_once(app: Celery, redis_url: str, redis_client: redis.Redis) -> None:
    """Sending a chunk takes several times as long as its reservation; the other sender takes none of it."""
    ids = [f"job-{n}" for n in range(60)]
    redis_client.lpush(Lane.BULK.queue, *[linked(job_id) for job_id in ids])
    jobs = make_lease_queue(redis_client, "w").claim(100).jobs
    sent: list[str] = []
    with FaultProxy(redis_url) as proxy, redis.Redis.from_url(proxy.url) as slow:
        store = AnswerStore(slow, token="w", callbacks_reserved_s=0.6)
        senders = [CallbackSender(app, slow, rules=RULES, retry_after_s=0.6) for _ in range(2)]
        for sender in senders:
            sender._send = lambda job_id, record: sent.append(job_id)  # type: ignore[method-assign]  # no broker here
        entries = [
            AnswerEntry(
                id=job.id,
                answer=Answer(id=job.id, status=Status.TAGGED),
                message=b"shiwu.bulk|" + job.raw,
                has_callbacks=True,
            )
            for job in jobs
        ]
        store.write(entries)
        proxy.delay(0.02)
        with ThreadPoolExecutor(2) as pool:
            owner = pool.submit(senders[0]._send_chunk, [job_id.encode() for job_id in ids])
            while not owner.done():
                pool.submit(senders[1]._send_chunk, []).result(timeout=GET_S)
        proxy.heal()
    assert sorted(sent) == sorted(ids)
    assert redis_client.exists(CANVAS, CANVAS_DUE) == 0


def test_callbacks_taken_by_another_sender_are_left(app: Celery, redis_client: redis.Redis) -> None:
    """Once another sender took them, neither the worker that answered nor a slow sender sends them."""
    redis_client.hset(CANVAS, "job", "x")
    redis_client.zadd(CANVAS_DUE, {"job": 1.0})
    other, mine = (CallbackSender(app, redis_client, rules=RULES) for _ in range(2))
    reservation, *_ = other._take(keys=[CANVAS, CANVAS_DUE], args=[60_000, 10])
    sent: list[str] = []
    mine._send = lambda job_id, record: sent.append(job_id)  # type: ignore[method-assign]  # no broker here
    assert mine._send_chunk([b"job"]) == 0
    mine._hold_after_s = 0.0
    mine._take = lambda **_: [b"1.5", b"job", b"x"]
    assert mine._send_chunk([]) == 1
    assert sent == []
    assert redis_client.zscore(CANVAS_DUE, "job") == float(reservation)


def test_record_of_a_new_message_is_not_dropped(app: Celery, redis_client: redis.Redis) -> None:
    """The id got new callbacks while the old ones were being sent."""
    redis_client.hset(CANVAS, "job", "old")
    redis_client.zadd(CANVAS_DUE, {"job": 1.0})
    callbacks = CallbackSender(app, redis_client, rules=RULES)

    def send(job_id: str, record: bytes) -> None:
        redis_client.hset(CANVAS, job_id, "new")

    callbacks._send = send  # type: ignore[method-assign]  # no broker here
    callbacks._send_chunk([])
    assert redis_client.hget(CANVAS, "job") == b"new"
    assert redis_client.zscore(CANVAS_DUE, "job") is not None
