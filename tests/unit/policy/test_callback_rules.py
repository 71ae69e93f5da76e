"""Which tasks and queues callbacks may name, and which parts of a signature are checked."""

from __future__ import annotations

from typing import Any

import pytest

from shiwu.broker.message_reader import Canvas
from shiwu.contract import RequestError
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import callback_rules
from shiwu_worker.policy.callback_rules import MAX_DEPTH, PROTOCOL_HEADERS, ROUTING_OPTIONS, CallbackRules

RULES = CallbackRules(tasks=("shiwu.tag", "app.*"), queues=("celery", "app-*"), max_tasks=20)


def task(name: str = "app.a", **options: Any) -> dict[str, Any]:
    """A signature as it comes from JSON."""
    return {"task": name, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


def made(kind: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """A chain, group or chord."""
    return task(f"celery.{kind}", **(options or {})) | {"kwargs": kwargs, "subtask_type": kind}


def canvas(*links: Any, **parts: Any) -> Canvas:
    """The callbacks of a message."""
    empty = {"errbacks": (), "chain": (), "chord": None, "group": None, "group_index": None, "root_id": None}
    return Canvas(**(empty | {"callbacks": links} | parts))


def deep(kind: str, levels: int) -> dict[str, Any]:
    """One task nested `levels` deep."""
    signature = task()
    for _ in range(levels - 1):
        signature = task(link=[signature]) if kind == "link" else made(kind, tasks=[signature])
    return signature


ALLOWED = [
    canvas(task(), task("shiwu.tag"), task("shiwu.tag", queue="shiwu.interactive"), task(queue="app-1")),
    canvas(errbacks=(task(),), chain=(task(), task()), chord=task()),
    canvas(made("chain", tasks=[task(), made("group", tasks=[task(), task()])])),
    canvas(made("chord", header=made("group", tasks=[task()]), body=task(link_error=task()))),
    canvas(made("chord", header=[task()], body=task())),
    canvas(task(link=[task()], headers={"sentry-trace": "1"}, countdown=5, priority=3, reply_to="anything")),
    canvas(made("chain", {"queue": "shiwu.bulk"}, tasks=[task("shiwu.tag")])),
    canvas(deep("link", MAX_DEPTH), deep("group", MAX_DEPTH)),
    canvas(*[task()] * 20),
]
REFUSED = [
    *(canvas(task(name)) for name in ("evil", "App.a", "app", "shiwu.tagged", "", "app.\n", "app." + "x" * 300)),
    *(canvas(task(f"celery.{name}")) for name in ("map", "chunks", "chain", "chord_unlock", "backend_cleanup")),
    canvas(errbacks=(task("evil"),)),
    canvas(chain=(task(), task("evil"))),
    canvas(chord=task("evil")),
    *(canvas(task(**{name: [task("evil")]})) for name in ("link", "link_error", "chain")),
    canvas(task(chord=task("evil"))),
    canvas(task(link=task(link_error=[made("group", tasks=[task(chord=task("evil"))])]))),
    canvas(made("chord", header=made("group", tasks=[task("evil")]), body=task())),
    canvas(made("chord", header=task(), body=task("evil"))),
    canvas(made("chain", {"link": [task("evil")]}, tasks=[task()])),
    *(canvas(task(queue=name)) for name in ("evil", "", 5, ["celery"], "shiwu.interactive", "shiwu.admin", "app-\r")),
    *(canvas(task("shiwu.tag", queue=name)) for name in ("shiwu.admin", "shiwu:claims", "shiwu.bulk.x")),
    canvas(made("chain", {"queue": "evil"}, tasks=[task()])),
]
UNSUPPORTED = [
    *(canvas(task(**{name: "x"})) for name in sorted(ROUTING_OPTIONS)),
    *(canvas(task(headers={name: "app.b"})) for name in sorted(PROTOCOL_HEADERS)),
    canvas(task(headers="x")),
    *(canvas(task(serializer=name)) for name in ("pickle", "yaml", ["json"], 0)),
    *(canvas(made(kind, task=task(), it=[1])) for kind in ("xmap", "xstarmap", "chunks", "map", "x")),
    canvas(task() | {"subtask_type": ["chain"]}),
    canvas(*[task()] * 21),
    canvas(made("group", tasks=[task()] * 20)),
    canvas(deep("link", MAX_DEPTH + 1)),
    canvas(deep("group", MAX_DEPTH + 1)),
]
MALFORMED = [
    *(canvas(value) for value in ("app.a", None, 5, [], {}, {"task": 5}, {"task": ["app.a"]})),
    *(canvas(task() | {"options": value}) for value in ("x", 5, [1])),
    *(canvas(task() | {"kwargs": value, "subtask_type": "chain"}) for value in ("x", 5, [1])),
    *(canvas(made("chain", tasks=value)) for value in ("app.a", 5, [[task()]], ["app.a"])),
    canvas(task(link="app.a")),
]


@pytest.mark.parametrize("callbacks", ALLOWED)
def test_allowed_callbacks_pass(callbacks: Canvas) -> None:
    """Every shape that Celery writes."""
    RULES.check(callbacks)


@pytest.mark.parametrize(
    ("callbacks", "code"),
    [
        *((callbacks, "callback_refused") for callbacks in REFUSED),
        *((callbacks, "unsupported_canvas") for callbacks in UNSUPPORTED),
        *((callbacks, "malformed_message") for callbacks in MALFORMED),
    ],
)
def test_refused_callbacks_have_their_code(callbacks: Canvas, code: str) -> None:
    """The code depends on the fault; the text is short for any input."""
    with pytest.raises(RequestError) as caught:
        RULES.check(callbacks)
    assert caught.value.code == code
    assert len(str(caught.value)) < 500


def test_refusal_names_the_task_and_the_setting() -> None:
    """The text names the setting to change."""
    with pytest.raises(RequestError, match=r"SHIWU_CALLBACK_TASKS.*'reports\.add'"):
        RULES.check(canvas(task("reports.add")))
    with pytest.raises(RequestError, match=r"SHIWU_CALLBACK_QUEUES.*'reports'"):
        RULES.check(canvas(task(queue="reports")))


def test_star_matches_no_celery_task_and_no_reserved_key() -> None:
    """Celery's tasks need a pattern with their prefix; Redis keys of shiwu and Celery are never queues."""
    everything = CallbackRules(tasks=("*",), queues=("*",))
    assert everything.allows_task("anything")
    assert not everything.allows_task("celery.map")
    assert CallbackRules(tasks=("celery.backend_*",)).allows_task("celery.backend_cleanup")
    assert everything.allows_queue("anything")
    reserved = (
        "shiwu:quarantine",
        "shiwu.admin",
        "celery-task-meta-x",
        "celery-taskset-meta-x.j",
        "_kombu.binding.x",
        "unacked",
    )
    assert not [name for name in reserved if everything.allows_queue(name)]


def test_callback_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default and empty: `shiwu.tag` only; lists are separated by commas; `none` allows nothing."""
    assert callback_rules(Settings()) == CallbackRules()
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "app.*, other.task")
    monkeypatch.setenv("SHIWU_CALLBACK_QUEUE", "usual")
    monkeypatch.setenv("SHIWU_CALLBACK_QUEUES", "app-*")
    monkeypatch.setenv("SHIWU_CALLBACK_MOST", "7")
    expected = CallbackRules(tasks=("app.*", "other.task"), queues=("usual", "app-*"), max_tasks=7)
    assert callback_rules(Settings()) == expected
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "")
    assert callback_rules(Settings()).allows_task("shiwu.tag")
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", " None ")
    assert not callback_rules(Settings()).allows_task("shiwu.tag")
