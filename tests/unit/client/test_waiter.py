"""Waits for answers, without a server: what is asked, in which order answers come, and when a wait ends."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu import RequestError, WaitTimeout
from shiwu.broker.redis_errors import ConnectionsBusy
from shiwu.client import waiter as module
from shiwu.client.waiter import CHUNK_SIZE, LISTENING_POLL_S, POLL_S, RETRY_PAUSE_S, as_answered, collect
from shiwu.contract import Answer, Status, result_key
from tests.support.clock import Clock


def value(job_id: str) -> bytes:
    """The value of a result key."""
    return b'{"status":"SUCCESS","task_id":"%s","result":%s}' % (
        job_id.encode(),
        Answer(id=job_id, status=Status.TAGGED).to_json(),
    )


class Parts:
    """Result keys and announcements of a server, and a clock that only waits move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        monkeypatch.setattr(module.threading, "Event", lambda: SimpleNamespace(wait=self._pause))
        self.keys: dict[str, bytes] = {}
        self.announced: list[tuple[float, str | None]] = []
        self.subscribed: list[int] = []
        self.polls: list[int] = []
        self.pauses: list[float] = []
        self.errors: list[Exception] = []
        self.is_busy = False
        pubsub = SimpleNamespace(subscribe=self._subscribe, get_message=self._get)
        self.listener: Any = SimpleNamespace(pubsub=lambda ignore_subscribe_messages: nullcontext(pubsub))
        self.client: Any = SimpleNamespace(mget=self._mget)

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.now_s += seconds

    def _subscribe(self, *channels: str) -> None:
        if self.is_busy:
            raise ConnectionsBusy("no")
        self.subscribed.append(len(channels))

    def _mget(self, keys: list[str]) -> list[bytes | None]:
        self.polls.append(len(keys))
        if self.errors:
            raise self.errors.pop(0)
        return [self.keys.get(key) for key in keys]

    def _get(self, *, timeout: float) -> Any:
        seconds, job_id = self.announced.pop(0) if self.announced else (math.inf, None)
        self.clock.now_s += min(seconds, timeout)
        if job_id is None:
            return None
        return {"channel": result_key(job_id).encode(), "data": value(job_id)}

    def wait(self, *ids: str, timeout_s: float = 60.0) -> list[str]:
        """The ids whose answers came, in their order."""
        return [
            job_id
            for job_id, answer in as_answered(self.client, self.listener, ids, timeout_s=timeout_s)
            if answer.id == job_id
        ]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """No answers."""
    return Parts(monkeypatch)


def test_answers_that_are_there_come_first(parts: Parts) -> None:
    """In the order of the ids; nothing is waited for where none is missing."""
    parts.keys = {result_key(job_id): value(job_id) for job_id in ("a", "c")}
    parts.announced = [(1.0, "x"), (1.0, "b")]
    began_s = parts.clock.now_s
    assert parts.wait("a", "b", "c") == ["a", "c", "b"]
    assert parts.clock.now_s - began_s == 2.0
    assert (parts.polls, parts.subscribed) == ([3], [3])
    assert parts.wait() == []
    assert parts.polls == [3]


def test_announced_answer_comes_once(parts: Parts) -> None:
    """Also where it is announced twice, as after a duplicate."""
    parts.announced = [(0.1, "a"), (0.1, "a"), (0.1, "b")]
    assert parts.wait("a", "b") == ["a", "b"]


def test_keys_are_polled_while_nothing_is_announced(parts: Parts) -> None:
    """An announcement may be lost."""
    parts.announced = [(LISTENING_POLL_S, None)]
    began_s = parts.clock.now_s
    assert parts.wait("a", timeout_s=2.5 * LISTENING_POLL_S) == []
    assert len(parts.polls) == 3
    assert parts.clock.now_s - began_s == pytest.approx(2.5 * LISTENING_POLL_S)


def test_wait_without_time_checks_once(parts: Parts) -> None:
    """And finds what is there; the number of seconds must be one."""
    parts.keys = {result_key("b"): value("b")}
    assert parts.wait("a", "b", timeout_s=0.0) == ["b"]
    assert parts.polls == [2]
    with pytest.raises(RequestError, match="nan"):
        parts.wait("a", timeout_s=math.nan)


def test_many_ids_are_asked_for_in_portions(parts: Parts) -> None:
    """Subscriptions and polls."""
    ids = [f"j{number}" for number in range(CHUNK_SIZE + 2)]
    parts.keys = {result_key(job_id): value(job_id) for job_id in ids}
    assert parts.wait(*ids) == ids
    assert parts.subscribed == parts.polls == [CHUNK_SIZE, 2]


def test_waiter_without_a_connection_polls_more_often(parts: Parts) -> None:
    """So that any number of threads may wait."""
    parts.is_busy = True
    assert parts.wait("a", timeout_s=2.5 * POLL_S) == []
    assert parts.pauses == pytest.approx([POLL_S, POLL_S, POLL_S / 2])
    assert parts.polls == [1] * 3


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("x")])
def test_wait_goes_on_after_an_error(parts: Parts, error: Exception) -> None:
    """After a pause, which ends with the wait."""
    parts.errors = [error, error]
    parts.keys = {result_key("a"): value("a")}
    assert parts.wait("a") == ["a"]
    assert parts.pauses == [RETRY_PAUSE_S] * 2
    parts.errors = [error] * 9
    assert parts.wait("b", timeout_s=1.5 * RETRY_PAUSE_S) == []
    assert parts.pauses[2:] == pytest.approx([RETRY_PAUSE_S, RETRY_PAUSE_S / 2])


def test_error_that_does_not_pass_ends_the_wait(parts: Parts) -> None:
    """A wrong password stays wrong."""
    parts.errors = [redis.AuthenticationError("wrong")]
    with pytest.raises(redis.AuthenticationError):
        parts.wait("a")
    assert parts.pauses == []


def test_collected_answers_are_in_the_order_of_their_ids() -> None:
    """Or a time-out says how many are missing."""
    answers: Any = {"b": 2, "a": 1}
    assert list(collect(answers.items(), ["a", "b"], timeout_s=1.0).items()) == [("a", 1), ("b", 2)]
    with pytest.raises(WaitTimeout, match="expected 4 answers within 1 s, 2 are missing, first c"):
        collect(answers.items(), ["a", "c", "b", "d"], timeout_s=1.0)
