"""What callbacks may name, and what of a signature is looked at."""

from __future__ import annotations

from typing import Any

import pytest

from shiwu.broker.message_reader import Canvas
from shiwu.contract import RequestError
from shiwu_worker.config.settings import Settings
from shiwu_worker.policy.callback_rules import MAX_DEPTH, PROTOCOL_HEADERS, ROUTING_OPTIONS, CallbackRules

RULES = CallbackRules(tasks=("shiwu.tag", "app.*"), queues=("celery", "app-*"), max_tasks=20)


def task(name: str = "app.a", **options: Any) -> dict[str, Any]:
    """A signature as JSON brings it."""
    return {"task": name, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


def made(kind: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """A chain, group or chord."""
    return task(f"celery.{kind}", **(options or {})) | {"kwargs": kwargs, "subtask_type": kind}


def canvas(*links: Any, **parts: Any) -> Canvas:
    """The callbacks of a message."""
    empty = {"errbacks": (), "chain": (), "chord": None, "group": None, "group_index": None, "root_id": None}
    return Canvas(**(empty | {"callbacks": links} | parts))


def deep(kind: str, levels: int) -> dict[str, Any]:
    """One task under so many levels."""
    one = task()
    for _ in range(levels - 1):
        one = task(link=[one]) if kind == "link" else made(kind, tasks=[one])
    return one


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
    *(canvas(one) for one in ("app.a", None, 5, [], {}, {"task": 5}, {"task": ["app.a"]})),
    *(canvas(task() | {"options": one}) for one in ("x", 5, [1])),
    *(canvas(task() | {"kwargs": one, "subtask_type": "chain"}) for one in ("x", 5, [1])),
    *(canvas(made("chain", tasks=one)) for one in ("app.a", 5, [[task()]], ["app.a"])),
    canvas(task(link="app.a")),
]


@pytest.mark.parametrize("one", ALLOWED)
def test_allowed_callbacks_pass(one: Canvas) -> None:
    """Every shape that Celery writes."""
    RULES.check(one)


@pytest.mark.parametrize(
    ("one", "code"),
    [
        *((one, "callback_refused") for one in REFUSED),
        *((one, "unsupported_canvas") for one in UNSUPPORTED),
        *((one, "malformed_message") for one in MALFORMED),
    ],
)
def test_refused_callbacks_have_their_code(one: Canvas, code: str) -> None:
    """Each with its code; the text is short, whatever came."""
    with pytest.raises(RequestError) as caught:
        RULES.check(one)
    assert caught.value.code == code
    assert len(str(caught.value)) < 500


def test_refusal_names_the_task_and_the_setting() -> None:
    """Who reads it knows what to change."""
    with pytest.raises(RequestError, match=r"SHIWU_CALLBACK_TASKS.*'reports\.add'"):
        RULES.check(canvas(task("reports.add")))
    with pytest.raises(RequestError, match=r"SHIWU_CALLBACK_QUEUES.*'reports'"):
        RULES.check(canvas(task(queue="reports")))


def test_star_matches_no_celery_task_and_no_reserved_key() -> None:
    """They must be named by a pattern that begins like them; our keys are no queues at all."""
    everything = CallbackRules(tasks=("*",), queues=("*",))
    assert everything.allows_task("anything")
    assert not everything.allows_task("celery.map")
    assert CallbackRules(tasks=("celery.backend_*",)).allows_task("celery.backend_cleanup")
    assert everything.allows_queue("anything")
    ours = (
        "shiwu:suspects",
        "shiwu.admin",
        "celery-task-meta-x",
        "celery-taskset-meta-x.j",
        "_kombu.binding.x",
        "unacked",
    )
    assert not [name for name in ours if everything.allows_queue(name)]


def test_callback_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and where the variable is empty, `shiwu.tag` alone; lists by commas; a word for nothing."""
    assert Settings().callback_rules == CallbackRules()
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "app.*, other.task")
    monkeypatch.setenv("SHIWU_CALLBACK_QUEUE", "usual")
    monkeypatch.setenv("SHIWU_CALLBACK_QUEUES", "app-*")
    monkeypatch.setenv("SHIWU_CALLBACK_MOST", "7")
    expected = CallbackRules(tasks=("app.*", "other.task"), queues=("usual", "app-*"), max_tasks=7)
    assert Settings().callback_rules == expected
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "")
    assert Settings().callback_rules.allows_task("shiwu.tag")
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", " None ")
    assert not Settings().callback_rules.allows_task("shiwu.tag")
