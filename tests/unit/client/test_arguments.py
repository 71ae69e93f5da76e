"""Odd arguments of the client: each is refused before Redis is asked, with its name and what was expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from shiwu import Client, DeadFilter, RequestError
from shiwu.broker.redis_url import RedisUrlError
from tests.support.both_clients import OPENERS
from tests.support.processes import LOOPBACK

NAN, INF = float("nan"), float("inf")
CLOSED = f"redis://{LOOPBACK}:1"
"""No server listens there: a missing check ends as an error of Redis."""
SECONDS = [-1, NAN, INF, -INF, "9", b"1", [1], True, 1e300, 10**400]
WHOLE = [-1, 1.5, "9", NAN, INF, True, [1], 10**30]
COUNT = [0, None, *WHOLE]
ODD_FLAG = [None, 1, "True", [True]]
TEXT = [5, b"x", None, "a\ud800", ["a"], "x" * 200_000]
JOB_ID = ["", "~" + "0a" * 20, "x" * 256, "猫" * 86, "a\ud800", 5, b"x", True, ["x"]]
LOOKED_UP_ID = ["", "x" * 5000, "a\ud800", 5, b"x", True, None, ["x"]]
IDS = [b"abc", 5, None, [5], [None], ["a\ud800"], [["x"]], "", [""]]

ODD: dict[str, dict[str, list[Any]]] = {
    "enqueue": {
        "image": ["cat.jpg", "", "s3://b/\ud800", *TEXT],
        "labels": ["no such name!", "", 5, [5], ["a\ud800"], {"a": 1}, [], [""], ["a", "a"], ["x" * 101]],
        "top_k": [0, -1, None, 1.5, INF, "x"],
        "threshold": [2, -1, NAN, "x", None],
        "min_cosine": [2, -2, NAN, "x"],
        "head": ["relu", 5, ["softmax"]],
        "want": ["tags", "x", [], 5, [5], None],
        "callback": [
            "",
            "a\n",
            "a b",
            "x" * 65,
            "http://h/",
            "https://u@h/",
            "https://h/#a",
            "https://h/" + "x" * 2048,
            1,
        ],
        "metadata": [{1, 2}, b"\xff", object(), {"a": object()}, "a\ud800", "x" * 5000],
        "lane": ["shiwu.interactive", "", "BULK", 5, None, ["bulk"], b"bulk"],
        "expires_s": SECONDS,
        "answer_by_s": SECONDS,
        "countdown_s": SECONDS,
        "priority": [10, None, *WHOLE],
        "replicas": [None, *WHOLE],
        "id": JOB_ID,
        "coalesce": ODD_FLAG,
    },
    "enqueue_many": {
        "images": [
            "s3://b/k",
            b"x",
            5,
            None,
            [5],
            [None],
            [["x"]],
            [{"imag": 1}],
            [{}],
            [{"image": "s3://b/k", "id": ""}],
        ],
        "lane": ["shiwu.bulk", None],
        "expires_s": SECONDS,
        "answer_by_s": SECONDS,
        "countdown_s": SECONDS,
        "priority": [10, None, *WHOLE],
        "replicas": [None, *WHOLE],
        "batch_size": COUNT,
        "max_waiting": [0, *WHOLE],
        "wait_s": [None, -1, NAN, "9", True, [1]],
        "id_from": ["x", 5, True, ["reference"]],
        "coalesce": ODD_FLAG,
    },
    "cancel": {"job_ids": [*IDS, ["~" + "0a" * 20], "x" * 256], "reason": TEXT},
    "answer": {"job_id": LOOKED_UP_ID},
    "shard_states": {},
    "wait": {"job_id": LOOKED_UP_ID, "timeout_s": [None, *SECONDS]},
    "wait_many": {"job_ids": IDS, "timeout_s": [None, *SECONDS]},
    "as_answered": {"job_ids": IDS, "timeout_s": [None, *SECONDS]},
    "tag": {"image": ["cat.jpg"], "timeout_s": [None, *SECONDS]},
    "results": {
        "group": ["", *TEXT],
        "consumer": ["", 5, b"x", "a\ud800", ["a"]],
        "batch": COUNT,
        "block_s": [None, *SECONDS],
        "reclaim_idle_s": [None, *SECONDS],
        "away_s": SECONDS,
        "on_unreadable": [None, 5],
    },
    "dead_letters": {"where": ["x", 5, {"code": "x"}], "limit": WHOLE},
    "dead_letter": {"job_id": LOOKED_UP_ID},
    "requeue": {"job_ids": IDS},
    "drop": {"job_ids": IDS},
    "sweep": {"zone": ["UTC", None, 5]},
    "server_time_ms": {},
    "queue_state": {},
    "explain": {"job_id": LOOKED_UP_ID},
    "running_workers": {},
    "stray_lanes": {},
    "known_labels": {"digest": ["", *TEXT]},
    "close": {},
}
GIVEN: dict[str, dict[str, Any]] = {
    "enqueue": {"image": "s3://b/k"},
    "enqueue_many": {"images": ["s3://b/k"]},
    "cancel": {"job_ids": "x"},
    "wait": {"job_id": "x", "timeout_s": 0.01},
    "wait_many": {"job_ids": ["x"], "timeout_s": 0.01},
    "as_answered": {"job_ids": ["x"], "timeout_s": 0.01},
    "tag": {"image": "s3://b/k", "timeout_s": 0.01},
    "results": {"group": "g", "stop_when_idle": True, "away_s": 0.0},
}
FLAGS = {"stop_when_idle"}
CASES = [(method, name, value) for method, odd in ODD.items() for name, values in odd.items() for value in values]


@pytest.fixture(scope="module", params=list(OPENERS))
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of a server that is not there, the blocking and the asyncio one."""
    with OPENERS[request.param](CLOSED, timeout_s=0.2) as made:
        yield made


def call(client: Client, method: str, **odd: Any) -> None:
    """Call the method, and read all that it yields."""
    made = getattr(client, method)(**GIVEN.get(method, {}) | odd)
    if isinstance(made, Iterator):
        list(made)


@pytest.mark.parametrize(
    ("method", "name", "value"), CASES, ids=[f"{method}-{name}-{n}" for n, (method, name, _) in enumerate(CASES)]
)
def test_client_invalid_argument_raises_clear_error(client: Client, method: str, name: str, value: Any) -> None:
    """Raises RequestError, or TypeError where the call itself is wrong."""
    with pytest.raises((RequestError, TypeError)) as caught:
        call(client, method, **{name: value})
    text = str(caught.value)
    assert text.startswith((name, "image", "expected")), text
    assert "expected" in text or isinstance(caught.value, TypeError), text
    assert "Input should" not in text
    assert "not supported between" not in text


def test_client_parameter_has_invalid_values_to_test() -> None:
    """A new parameter needs a check, and a row in the table."""
    methods = {name: each for name, each in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")}
    assert set(methods) == set(ODD)
    for method, function in methods.items():
        parameters = {
            one.name
            for one in inspect.signature(function).parameters.values()
            if one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        assert parameters - {"self"} - FLAGS == set(ODD[method]), method


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_waiting", COUNT),
        ("timeout_s", [None, 0, *SECONDS]),
        ("max_connections", COUNT),
        ("redis_url", [5, b"redis://x", ["x"], "", "http://x"]),
    ],
)
def test_client_constructor_refuses_invalid_argument(name: str, values: list[Any]) -> None:
    """The check comes before any connection."""
    for value in values:
        with pytest.raises((RequestError, RedisUrlError), match="expected"):
            Client(**{"redis_url": CLOSED} | {name: value})


@pytest.mark.parametrize("name", ["older_s", "newer_s"])
def test_dead_filter_refuses_invalid_age(name: str) -> None:
    """NaN would match nothing without any error."""
    for value in SECONDS:
        with pytest.raises(RequestError, match=name):
            DeadFilter(**{name: value})


FINE: list[Callable[[Client], Any]] = [
    lambda client: client.as_answered("one", timeout_s=np.float64(0.0)),
    lambda client: client.enqueue_many(["s3://b/k"], priority=np.int64(3), expires_s=np.float32(1.5), wait_s=INF),
    lambda client: client.dead_letters(limit=0),
    lambda client: client.results(group="g", consumer=None, away_s=None),
]


@pytest.mark.parametrize("asked", FINE)
def test_client_accepts_numpy_numbers(client: Client, asked: Callable[[Client], Any]) -> None:
    """Numbers of numpy and the limits themselves are accepted."""
    assert isinstance(asked(client), Iterator)
