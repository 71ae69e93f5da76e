"""Callbacks of hostile producers: only allowed tasks leave the worker, and only for allowed queues.

What lies in the lists of a real Valkey afterwards is what was sent.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.contract import CANVAS, CANVAS_DUE, RESULT_STREAM, Answer, ErrorInfo, ImageInfo, Lane, Stage, Status
from shiwu.contract.vocabulary import ErrorCode
from shiwu_worker.celery_worker.callback_app import make_callback_app
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import callback_rules
from tests.conftest import LONG
from tests.support.redis_parts import message

# Celery's own use of redis; its pools are left to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TASKS, QUEUES = ("shiwu.tag", "ok.a", "ok.b"), ("celery", "ok-queue", *Lane.BULK.keys, *Lane.INTERACTIVE.keys)
SHIWU_KEYS = {
    CANVAS,
    CANVAS_DUE,
    RESULT_STREAM,
    "shiwu:counters",
    "shiwu:dead",
    "shiwu:dead:answers",
    "shiwu:dead:messages",
}


class HostileProducer:
    """Sends a message with any callbacks, has it answered, and checks which tasks are sent."""

    def __init__(self, client: redis.Redis, app: Any, rules: Any) -> None:
        self._client = client
        self._callbacks = CallbackSender(app, client, rules=rules)
        self._answer_store = AnswerStore(client, token="w", callbacks_reserved_s=0.0)
        self._number = 0

    def send(self, embed: Any, *, headers: dict[str, Any] | None = None, is_tagged: bool = True) -> list[str]:
        """Return the names of the tasks that are sent for these callbacks; fail if one is not allowed."""
        self._number += 1
        job_id = f"job-{self._number}"
        raw = json.loads(message(job_id, Lane.BULK))
        raw["headers"] |= headers or {}
        raw["body"] = base64.b64encode(json.dumps([["s3://b/k.jpg"], {}, embed]).encode()).decode()
        error = None if is_tagged else ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="gone", stage=Stage.FETCH)
        status = Status.TAGGED if is_tagged else Status.REJECTED
        answer = Answer(id=job_id, status=status, image=ImageInfo(reference="s3://b/k.jpg"), error=error)
        entry = AnswerEntry(
            answer=answer, id=job_id, message=b"shiwu.bulk|" + json.dumps(raw).encode(), has_callbacks=True
        )
        self._answer_store.write([entry])
        assert self._callbacks._send_chunk([]) == 1
        return self._sent()

    def _sent(self) -> list[str]:
        names = []
        keys: Any = self._client.keys()
        for key in sorted(keys):
            text = key.decode(errors="replace")
            if self._client.type(key) == b"list":
                assert text in QUEUES, f"something was sent to {text!r}"
                items: Any = self._client.lrange(key, 0, -1)
                for item in items:
                    names += self._names(json.loads(item))
                self._client.delete(key)
            else:
                known = text in {*SHIWU_KEYS, *QUEUES} or text.startswith(
                    ("celery-task", "shiwu:marks:", "shiwu:done:", "shiwu:pending-answers", "_kombu.binding")
                )
                assert known, f"expected no key {text!r}"
        return names

    def _names(self, sent: dict[str, Any]) -> list[str]:
        assert sent["content-type"] == "application/json"
        embed = json.loads(base64.b64decode(sent["body"]))[2]
        found = [sent["headers"]["task"], *named(embed)]
        assert set(found) <= set(TASKS), found
        return found


def named(value: Any) -> list[str]:
    """Return every task that is named anywhere in the callbacks of a message."""
    if isinstance(value, list):
        return [name for item in value for name in named(item)]
    if not isinstance(value, dict):
        return []
    is_taken_apart = value.get("subtask_type") in {"chain", "group", "chord"}
    own = [value["task"]] if isinstance(value.get("task"), str) and not is_taken_apart else []
    return own + [name for item in value.values() for name in named(item)]


@pytest.fixture
def producer(redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileProducer]:
    """Callbacks of a worker whose operator allows `ok.*` and one queue."""
    monkeypatch.setenv("SHIWU_REDIS_URL", redis_url)
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "shiwu.tag,ok.*")
    monkeypatch.setenv("SHIWU_CALLBACK_QUEUES", "ok-queue")
    worker = Settings()
    app = make_callback_app(worker)
    yield HostileProducer(redis_client, app, callback_rules(worker))
    app.close()


def task(name: str = "ok.a", **options: Any) -> dict[str, Any]:
    """A signature."""
    return {"task": name, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


def made(kind: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """A chain, group or chord."""
    return task(f"celery.{kind}", **(options or {})) | {"kwargs": kwargs, "subtask_type": kind}


EVIL = task("evil")
INSIDE: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda signature: signature,
    "link": lambda signature: task(link=[signature]),
    "link_error": lambda signature: task(link_error=signature),
    "chain option": lambda signature: task(chain=[signature]),
    "chord option": lambda signature: task(chord=signature),
    "in a chain": lambda signature: made("chain", tasks=[task(), signature]),
    "in a group": lambda signature: made("group", tasks=[task(), signature]),
    "in a chord": lambda signature: made("chord", header=[task(), signature], body=task()),
    "body of a chord": lambda signature: made("chord", header=[task(), task()], body=signature),
    "link of a chain": lambda signature: made("chain", {"link": [signature]}, tasks=[task(), task()]),
    "options of a chain": lambda signature: made("chain", {"options": {"link": [signature]}}, tasks=[task()]),
    "options of options": lambda signature: task(options={"link": [signature]}),
}


@pytest.mark.parametrize("is_tagged", [True, False])
@pytest.mark.parametrize("part", ["callbacks", "errbacks", "chain", "chord"])
@pytest.mark.parametrize("inside", INSIDE)
def test_no_position_hides_a_task(producer: HostileProducer, inside: str, part: str, *, is_tagged: bool) -> None:
    """If a message names a task that is not allowed, in any position, none of its tasks is sent."""
    signature = INSIDE[inside](EVIL)
    group = {"group": "g", "group_index": 0}
    assert (
        producer.send({part: signature if part == "chord" else [signature]}, headers=group, is_tagged=is_tagged) == []
    )


OTHERS = [
    task("ok.a", headers={"task": "evil"}),
    task("ok.a", link=task(headers={"task": "evil"})),
    task("ok.a", exchange="evil", routing_key="evil"),
    task("ok.a", queue="ok-queue", exchange="celery.pidbox", exchange_type="fanout"),
    task("ok.a", connection="redis://127.0.0.1:1/0"),
    task("ok.a", serializer="pickle"),
    task("ok.a", queue="shiwu:quarantine"),
    task("ok.a", queue="shiwu.interactive"),
    task("ok.a", queue={"name": "evil"}),
    task("celery.backend_cleanup"),
    task("celery.map") | {"kwargs": {"task": EVIL, "it": [1]}, "subtask_type": "xmap"},
    task("celery.chunks") | {"kwargs": {"task": EVIL, "it": [[1]], "n": 1}, "subtask_type": "chunks"},
    task("celery.chain") | {"subtask_type": "no such kind"},
    task("ok.a", link="ok.a"),
    made("chain", tasks=[["evil"]]),
    {"task": None},
    "evil",
    5,
]


@pytest.mark.parametrize("signature", OTHERS, ids=[str(signature)[:60] for signature in OTHERS])
def test_other_ways_to_send_are_refused(producer: HostileProducer, signature: Any) -> None:
    """Headers that rename a task, exchanges, other servers, keys of shiwu, Celery's own tasks, and non-signatures."""
    for part in ("callbacks", "errbacks", "chain"):
        for is_tagged in (True, False):
            assert producer.send({part: [signature]}, is_tagged=is_tagged) == []


def test_allowed_callbacks_are_sent(producer: HostileProducer) -> None:
    """Without this the tests above would prove nothing."""
    assert producer.send({"callbacks": [task(), task("ok.b", queue="ok-queue")]}) == ["ok.a", "ok.b"]
    assert producer.send({"chain": [task("ok.b"), task()]}) == ["ok.a", "ok.b"]
    assert producer.send({"errbacks": [task()]}, is_tagged=False) == ["ok.a"]
    assert producer.send({"callbacks": [made("chord", header=[task()] * 2, body=task("ok.b"))]})[:1] == ["ok.a"]
    assert producer.send({"callbacks": [task("shiwu.tag", queue="shiwu.interactive")]}) == ["shiwu.tag"]


def test_errback_of_celery_itself_is_not_run(producer: HostileProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery calls an errback directly if the process knows the task; the worker's app knows none."""
    assert dict(producer._callbacks._app.tasks) == {}
    monkeypatch.setattr("shiwu_worker.policy.callback_rules.CallbackRules.check", lambda *_: None)
    for name in ("celery.accumulate", "celery.starmap", "celery.chord", "celery.chunks"):
        assert producer.send({"errbacks": [task(name)]}, is_tagged=False) == []


def test_callbacks_are_checked_again_before_sending(producer: HostileProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app refuses a task if the check of signatures misses it."""
    monkeypatch.setattr("shiwu_worker.policy.callback_rules.CallbackRules.check", lambda *_: None)
    for inside in INSIDE.values():
        for is_tagged in (True, False):
            assert "evil" not in producer.send({"callbacks": [inside(EVIL)]}, is_tagged=is_tagged)
            assert "evil" not in producer.send(
                {"errbacks": [inside(EVIL)], "chain": [inside(EVIL)]}, is_tagged=is_tagged
            )
    for signature in OTHERS:
        producer.send({"callbacks": [signature]})


@pytest.mark.parametrize(
    "options",
    [
        {"reply_to": "shiwu:quarantine"},
        {"task_id": "x" * 100_000},
        {"task_id": {"a": 1}},
        {"countdown": 1e308},
        {"countdown": "soon"},
        {"eta": "never", "expires": "never"},
        {"expires": -1e9},
        {"priority": "high"},
        {"time_limit": "x", "soft_time_limit": []},
        {"ignore_result": "maybe"},
        {"retries": 1e308, "replaced_task_nesting": 10**30},
        {"stamped_headers": ["task", "queue", "exchange"], "task": "evil"},
        {"stamped_headers": ["a"], "a": {"task": "evil"}},
        {"stamped_headers": 5},
        {"group_id": "shiwu:quarantine", "group_index": "x"},
        {"chord_size": 10**30},
        {"no_such_option": [1], "body_encoding": "x", "delivery_info": {"exchange": "evil"}, "content_type": "x"},
    ],
    ids=lambda options: str(options)[:LONG],
)
def test_malformed_options_do_no_harm(producer: HostileProducer, options: dict[str, Any]) -> None:
    """The callback is sent or fails; the next one is sent in any case."""
    for embed in ({"callbacks": [task(**options)]}, {"chain": [task(**options)]}, {"chord": task(**options)}):
        for is_tagged in (True, False):
            producer.send(embed, headers={"group": "g", "group_index": 0}, is_tagged=is_tagged)
    assert producer.send({"callbacks": [task()]}) == ["ok.a"]


HEADERS: list[dict[str, Any]] = [
    {"group": "x" * 1000},
    {"group": {"a": 1}},
    {"group": ["shiwu:quarantine"], "group_index": {}},
    {"group": "g", "group_index": False},
    {"root_id": 5, "parent_id": []},
    {"group": "../../shiwu:quarantine\n", "group_index": 10**400},
    {"reply_to": "shiwu:quarantine", "replaced_task_nesting": 10**30, "stamped_headers": ["task"], "stamps": 5},
    {"timelimit": ["x"], "retries": "x", "ignore_result": "x", "shadow": {"task": "evil"}},
]


@pytest.mark.parametrize("headers", HEADERS, ids=lambda headers: str(headers)[:LONG])
def test_headers_cannot_choose_a_redis_key(producer: HostileProducer, headers: dict[str, Any]) -> None:
    """`reply_to` is not used, and groups only lead to Celery's own keys."""
    for is_tagged in (True, False):
        producer.send({"callbacks": [task()], "chord": task()}, headers=headers, is_tagged=is_tagged)
    assert producer.send({"callbacks": [task()]}) == ["ok.a"]


def test_waiting_caller_learns_of_a_refused_callback(producer: HostileProducer, redis_client: redis.Redis) -> None:
    """Later tasks of the chain and the chord's body get a result; the log names the refused task."""
    with structlog.testing.capture_logs() as logs:
        producer.send({"chain": [task("evil", task_id="last"), task(task_id="next")], "chord": task(task_id="body")})
        producer.send({"chain": [task("evil", task_id="~" + "0a" * 20), task("evil", task_id="y" * 1000)]})
    for task_id in ("next", "last", "body"):
        meta = json.loads(str(redis_client.get(f"celery-task-meta-{task_id}"), "utf-8"))  # type: ignore[arg-type]  # redis-py's
        assert (meta["status"], meta["result"]["exc_type"]) == ("FAILURE", "JobFailed")
        assert "callback_refused" in str(meta["result"]["exc_message"])
    assert set(redis_client.keys("celery-task-meta-*")) == {
        *(f"celery-task-meta-{name}".encode() for name in ("next", "last", "body", "job-1", "job-2"))
    }
    first = logs[0]
    assert (first["event"], first["id"], first["code"]) == ("callbacks_refused", "job-1", "callback_refused")
    assert "'evil'" in first["error"]


def test_many_and_deep_callbacks_cost_little(producer: HostileProducer) -> None:
    """As many callbacks as a message can hold, and nested structures within the limit, which Celery copies."""
    began_s = time.monotonic()
    assert producer.send({"callbacks": [{"task": "ok.a"}] * 10_000}) == []
    assert producer.send({"chain": [{"task": "ok.a", "options": {"task_id": f"t{n}"}} for n in range(4000)]}) == []
    assert producer.send({"callbacks": [task(kwargs_="x" * 150_000)]}) == ["ok.a"]
    for kind in ("chain", "group", "chord"):
        signature = task()
        for _ in range(9):
            signature = (
                made("chord", header=[signature, task()], body=task())
                if kind == "chord"
                else made(kind, tasks=[signature, task()])
            )
        for part in ("callbacks", "errbacks", "chain"):
            for is_tagged in (True, False):
                producer.send({part: [signature]}, is_tagged=is_tagged)
    assert time.monotonic() - began_s < 20


def test_message_that_redis_refuses_delays_no_other(producer: HostileProducer, redis_client: redis.Redis) -> None:
    """If the server refuses this message only, the worker drops it, because it would fail forever."""
    redis_client.set("celery-taskset-meta-g.j", "no sorted set")
    assert producer.send({"chord": task()}, headers={"group": "g", "group_index": 0}) == []
    redis_client.set("ok-queue", "no list")
    assert producer.send({"callbacks": [task(queue="ok-queue")]}) == []
    assert not redis_client.exists(CANVAS, CANVAS_DUE)
    assert producer.send({"callbacks": [task()]}) == ["ok.a"]


NAMES = st.sampled_from(["ok.a", "ok.b", "shiwu.tag", "evil", "celery.map", "celery.chord", "ok.\n", ""])
JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))
DESTINATIONS = st.sampled_from(["celery", "ok-queue", "shiwu.bulk", "shiwu:quarantine", "evil", "", None])


def signatures(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Signatures around others, with options that route elsewhere, and sometimes with wrong fields."""
    several = st.one_of(inner, st.lists(inner, max_size=3))
    options = st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("link", "link_error", "chain", "chord"), several),
            **dict.fromkeys(("queue", "exchange", "routing_key", "reply_to", "connection"), DESTINATIONS),
            **dict.fromkeys(("task_id", "group_id", "countdown", "expires", "priority", "type", "serializer"), JUNK),
            "headers": st.dictionaries(st.sampled_from(["task", "id", "x"]), NAMES, max_size=2),
            "options": st.fixed_dictionaries({}, optional={"link": several, "queue": DESTINATIONS}),
        },
    )
    kwargs = st.fixed_dictionaries({}, optional=dict.fromkeys(("tasks", "header", "body", "task", "it"), several))
    kinds = st.sampled_from([None, None, None, "chain", "group", "chord", "xmap", "chunks", "x"])
    shape = {"task": NAMES, "options": options, "kwargs": kwargs, "subtask_type": kinds}
    return st.one_of(
        st.fixed_dictionaries(shape | {"args": st.just([])}), st.fixed_dictionaries({}, optional=shape), JUNK
    )


ANY = st.recursive(st.one_of(NAMES.map(task), st.just(task())), signatures, max_leaves=6)
EMBEDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("callbacks", "errbacks", "chain"), st.one_of(st.lists(ANY, max_size=3), ANY)),
        "chord": ANY,
    },
)
GROUPS = st.fixed_dictionaries(
    {}, optional={"group": st.one_of(JUNK, st.just("g")), "group_index": JUNK, "root_id": JUNK}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=120)
@given(embed=EMBEDS, headers=GROUPS, is_tagged=st.booleans(), is_read=st.booleans())
def test_any_message_sends_only_allowed_tasks(
    producer: HostileProducer, embed: Any, headers: dict[str, Any], *, is_tagged: bool, is_read: bool
) -> None:
    """Only allowed tasks are sent: with the check of signatures and the app, and with the app alone."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_read:
            patch.setattr("shiwu_worker.policy.callback_rules.CallbackRules.check", lambda *_: None)
        producer.send(embed, headers=headers, is_tagged=is_tagged)
