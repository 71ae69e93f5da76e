"""How messages are sent: what is asked of Redis, what is repeated, and by which clock times are meant."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError

from shiwu import QueueFull, RequestError
from shiwu.broker import steps
from shiwu.broker.message_reader import read_message
from shiwu.broker.redis_errors import NotReplicated
from shiwu.broker.steps import run
from shiwu.client import sender as module
from shiwu.client.sender import CLOCK_REFRESH_S, Sender, SendOptions, _check_sizes
from shiwu.contract import DEADLINES, MAX_MESSAGE_BYTES, Lane, Request, parse_request
from tests.support.clock import Clock

SERVER_MS = 5_000_000.0
REQUEST = Request(image="s3://b/k")


class Parts:
    """A sender over a Redis that keeps what it gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, max_waiting: int = 10) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        monkeypatch.setattr(steps, "Event", lambda: SimpleNamespace(wait=self._pause))
        monkeypatch.setattr(steps, "run_on_connection", lambda _, command: self._on_connection(command))
        self.waiting = 0
        self.asked = 0
        self.errors: list[Exception] = []
        self.pauses: list[float] = []
        self.pushed: list[tuple[str, tuple[bytes, ...]]] = []
        self.deadlines: list[tuple[str, dict[str, float]]] = []
        self.deadline_error: Exception | None = None
        self.commands: list[Any] = []
        self.reached = 9
        self.client: Any = SimpleNamespace(
            lpush=self._push,
            zadd=self._index,
            time=self._server_time,
            pipeline=self._count,
            client=lambda: _Context(self),
        )
        self.sender = Sender(max_waiting=max_waiting, timeout_s=4.0)

    def _server_time(self) -> tuple[float, float]:
        self.asked += 1
        self.clock.now_s += 0.2
        return SERVER_MS / 1000, 0

    def _count(self, *, transaction: bool) -> Any:
        assert not transaction
        if self.errors:
            raise self.errors.pop(0)
        lengths = [0, self.waiting, 0, 0]
        return SimpleNamespace(llen=lambda _: None, execute=lambda: lengths)

    def _on_connection(self, command: Any) -> list[Any]:
        self.commands.append(command)
        return [self.reached if command[0] == "WAIT" else 1]

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.now_s += seconds
        self.waiting = max(0, self.waiting - 1)

    def _push(self, key: str, *messages: bytes) -> None:
        self.pushed.append((key, messages))

    def _index(self, key: str, deadlines: dict[str, float]) -> None:
        if self.deadline_error is not None:
            raise self.deadline_error
        self.deadlines.append((key, deadlines))

    def send(self, *ids: str, **options: Any) -> list[str]:
        """Send requests with these ids."""
        jobs = [(REQUEST, job_id) for job_id in ids]
        return run(self.client, self.sender.send_steps(jobs, SendOptions(**({"lane": Lane.BULK} | options))))

    def server_time_ms(self) -> float:
        """The sender's estimate."""
        return run(self.client, self.sender.server_time_steps())


class _Context:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __enter__(self) -> Any:
        return self._value

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A lane that may hold ten messages."""
    return Parts(monkeypatch)


@pytest.mark.parametrize(("priority", "step"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2), (8, 2), (9, 3)])
def test_message_goes_to_the_list_of_its_priority(parts: Parts, priority: int, step: int) -> None:
    """kombu has four lists for each lane; the jobs of a portion stay in their order."""
    assert parts.send("a", "b", priority=priority) == ["a", "b"]
    [(key, messages)] = parts.pushed
    assert key == Lane.BULK.keys[step]
    assert [read_message(raw).id for raw in messages] == ["a", "b"]
    assert {json.loads(raw)["properties"]["priority"] for raw in messages} == {priority}
    assert (parts.deadlines, parts.commands) == ([], [])


@pytest.mark.parametrize(
    ("options", "expires_s", "answer_by_s"),
    [
        ({}, None, None),
        ({"expires_s": 7}, 7, None),
        ({"answer_by_s": 9}, 9, 9),
        ({"expires_s": 7, "answer_by_s": 9}, 7, 9),
        ({"expires_s": 11, "answer_by_s": 9, "countdown_s": 2}, 9, 9),
    ],
)
def test_times_count_from_the_servers_clock(
    parts: Parts, options: dict[str, float], expires_s: float | None, answer_by_s: float | None
) -> None:
    """The job expires at the earlier one; only the time of an answer is indexed."""
    parts.send("a", **options)
    [(_, [raw])] = parts.pushed
    envelope = read_message(raw)
    now_ms = parts.server_time_ms()
    assert now_ms == pytest.approx(SERVER_MS + 100.0)
    assert envelope.sent_ms == pytest.approx(now_ms)
    times = (envelope.expires_ms, envelope.answer_by_ms, envelope.eta_ms)
    expected = (expires_s, answer_by_s, options.get("countdown_s"))
    for found, seconds in zip(times, expected, strict=True):
        assert found == (None if seconds is None else pytest.approx(now_ms + seconds * 1000, abs=0.01))
    assert parts.deadlines == ([] if answer_by_s is None else [(DEADLINES, {"a": envelope.answer_by_ms})])


def test_message_is_sent_where_its_deadline_is_not_indexed(parts: Parts) -> None:
    """The message carries it; a user of an older ACL may not write the index."""
    parts.deadline_error = NoPermissionError("no")
    parts.send("a", answer_by_s=9)
    assert len(parts.pushed) == 1


def test_servers_clock_is_asked_once_a_minute(parts: Parts) -> None:
    """In between it goes on with this machine's; it was read half way between question and reply."""
    assert parts.server_time_ms() == pytest.approx(SERVER_MS + 100.0)
    parts.clock.now_s += CLOCK_REFRESH_S - 1.0
    assert parts.server_time_ms() == pytest.approx(SERVER_MS + 100.0 + (CLOCK_REFRESH_S - 1.0) * 1000)
    assert parts.asked == 1
    parts.clock.now_s += 1.0
    parts.server_time_ms()
    assert parts.asked == 2


@pytest.mark.parametrize(("waiting", "is_full"), [(8, False), (9, True)])
def test_lane_holds_no_more_than_its_limit(parts: Parts, waiting: int, *, is_full: bool) -> None:
    """With the messages that are to be sent; an option of the call replaces the client's limit."""
    parts.waiting = waiting
    if is_full:
        with pytest.raises(QueueFull, match=r"2 messages in lane bulk, which holds 9 of 10"):
            parts.send("a", "b")
        assert parts.pushed == []
        parts.send("a", "b", max_waiting=11)
    else:
        parts.send("a", "b")
    assert len(parts.pushed) == 1
    with pytest.raises(QueueFull):
        parts.send("a", max_waiting=waiting)


def test_full_lane_is_waited_for(parts: Parts) -> None:
    """With growing pauses, as long as the caller allows."""
    parts.waiting = 13
    parts.send("a", wait_s=60.0)
    assert len(parts.pauses) == 4
    assert 0 < parts.pauses[0] < parts.pauses[3]
    parts.waiting = 10**6
    began_s = parts.clock.now_s
    with pytest.raises(QueueFull):
        parts.send("a", wait_s=60.0)
    assert 60.0 <= parts.clock.now_s - began_s < 120.0


@pytest.mark.parametrize(
    ("error", "is_repeated"),
    [
        (redis.ConnectionError("away"), True),
        (redis.AuthenticationError("wrong"), False),
        (NotReplicated("too few"), False),
    ],
)
def test_only_errors_that_pass_are_waited_for(parts: Parts, error: Exception, *, is_repeated: bool) -> None:
    """What was written on the primary is not written again; without a time to wait nothing is repeated."""
    parts.errors = [error]
    if is_repeated:
        parts.send("a", wait_s=math.inf)
    else:
        with pytest.raises(type(error)):
            parts.send("a", wait_s=math.inf)
    assert len(parts.pauses) == is_repeated
    parts.errors = [error]
    with pytest.raises(type(error)):
        parts.send("a")


def test_wait_is_reported_once_in_a_while(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    """Not at each try."""
    parts.waiting = 10**6
    with pytest.raises(QueueFull):
        parts.send("a", wait_s=module.REPORT_EVERY_S * 2.5)
    assert 2 <= len(caplog.records) <= 3
    assert len(parts.pauses) > len(caplog.records)


def test_replicas_confirm_on_the_same_connection(parts: Parts) -> None:
    """Within half of a command's time."""
    parts.send("a", "b", replicas=2)
    push, wait = parts.commands
    assert push[:2] == ("LPUSH", Lane.BULK.queue)
    assert len(push) == 4
    assert (wait, parts.pushed) == (("WAIT", 2, 2000), [])
    parts.reached = 1
    with pytest.raises(NotReplicated):
        parts.send("a", replicas=2)


def test_message_has_a_largest_size() -> None:
    """Every worker would refuse a larger one."""
    jobs = [(REQUEST, "a"), (REQUEST, "b")]
    _check_sizes([b"x" * MAX_MESSAGE_BYTES, b""], jobs)
    with pytest.raises(RequestError, match="job b has") as caught:
        _check_sizes([b"", b"x" * (MAX_MESSAGE_BYTES + 1)], jobs)
    assert caught.value.code.value == "message_too_large"


def test_ids_are_given_or_made(parts: Parts) -> None:
    """One that is given is not replaced, also where it is refused."""
    items: list[tuple[dict[str, Any], str | None]] = [({"image": "s3://b/k"}, "x"), ({"image": "s3://b/l"}, None)]

    def send(items: list[tuple[dict[str, Any], str | None]], made: str) -> list[str]:
        steps = parts.sender.send_items_steps(items, SendOptions(Lane.BULK), make_id=lambda _: made)
        return run(parts.client, steps)

    assert send(items, "made") == ["x", "made"]
    with pytest.raises(RequestError):
        send([({"image": "s3://b/k"}, "")], "y")
    assert parse_request({"image": "s3://b/k"}) == REQUEST
