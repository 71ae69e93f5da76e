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


class Place:
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
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """No answers."""
    return Place(monkeypatch)


def test_answers_that_are_there_come_first(place: Place) -> None:
    """In the order of the ids; nothing is waited for where none is missing."""
    place.keys = {result_key(job_id): value(job_id) for job_id in ("a", "c")}
    place.announced = [(1.0, "x"), (1.0, "b")]
    began_s = place.clock.now_s
    assert place.wait("a", "b", "c") == ["a", "c", "b"]
    assert place.clock.now_s - began_s == 2.0
    assert (place.polls, place.subscribed) == ([3], [3])
    assert place.wait() == []
    assert place.polls == [3]


def test_announced_answer_comes_once(place: Place) -> None:
    """Also where it is announced twice, as after a duplicate."""
    place.announced = [(0.1, "a"), (0.1, "a"), (0.1, "b")]
    assert place.wait("a", "b") == ["a", "b"]


def test_keys_are_polled_while_nothing_is_announced(place: Place) -> None:
    """An announcement may be lost."""
    place.announced = [(LISTENING_POLL_S, None)]
    began_s = place.clock.now_s
    assert place.wait("a", timeout_s=2.5 * LISTENING_POLL_S) == []
    assert len(place.polls) == 3
    assert place.clock.now_s - began_s == pytest.approx(2.5 * LISTENING_POLL_S)


def test_wait_without_time_checks_once(place: Place) -> None:
    """And finds what is there; the number of seconds must be one."""
    place.keys = {result_key("b"): value("b")}
    assert place.wait("a", "b", timeout_s=0.0) == ["b"]
    assert place.polls == [2]
    with pytest.raises(RequestError, match="nan"):
        place.wait("a", timeout_s=math.nan)


def test_many_ids_are_asked_for_in_portions(place: Place) -> None:
    """Subscriptions and polls."""
    ids = [f"j{number}" for number in range(CHUNK_SIZE + 2)]
    place.keys = {result_key(job_id): value(job_id) for job_id in ids}
    assert place.wait(*ids) == ids
    assert place.subscribed == place.polls == [CHUNK_SIZE, 2]


def test_waiter_without_a_connection_polls_more_often(place: Place) -> None:
    """So that any number of threads may wait."""
    place.is_busy = True
    assert place.wait("a", timeout_s=2.5 * POLL_S) == []
    assert place.pauses == pytest.approx([POLL_S, POLL_S, POLL_S / 2])
    assert place.polls == [1] * 3


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("x")])
def test_wait_goes_on_after_an_error(place: Place, error: Exception) -> None:
    """After a pause, which ends with the wait."""
    place.errors = [error, error]
    place.keys = {result_key("a"): value("a")}
    assert place.wait("a") == ["a"]
    assert place.pauses == [RETRY_PAUSE_S] * 2
    place.errors = [error] * 9
    assert place.wait("b", timeout_s=1.5 * RETRY_PAUSE_S) == []
    assert place.pauses[2:] == pytest.approx([RETRY_PAUSE_S, RETRY_PAUSE_S / 2])


def test_error_that_does_not_pass_ends_the_wait(place: Place) -> None:
    """A wrong password stays wrong."""
    place.errors = [redis.AuthenticationError("wrong")]
    with pytest.raises(redis.AuthenticationError):
        place.wait("a")
    assert place.pauses == []


def test_collected_answers_are_in_the_order_of_their_ids() -> None:
    """Or a time-out says how many are missing."""
    answers: Any = {"b": 2, "a": 1}
    assert list(collect(answers.items(), ["a", "b"], timeout_s=1.0).items()) == [("a", 1), ("b", 2)]
    with pytest.raises(WaitTimeout, match="expected 4 answers within 1 s, 2 are missing, first c"):
        collect(answers.items(), ["a", "c", "b", "d"], timeout_s=1.0)
