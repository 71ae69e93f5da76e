"""Steps with a blocking client, without a server."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.broker import steps as module
from shiwu.broker.steps import OnOneConnection, Pause, Steps, iterate, run


def test_steps_get_replies_and_give_their_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls get the client, pauses are made, and commands for one connection share it."""
    pauses: list[float] = []
    sent: list[Any] = []

    def send(connected: Any, command: Any) -> list[Any]:
        sent.append((connected, command))
        return [len(sent)]

    monkeypatch.setattr(module, "Event", lambda: SimpleNamespace(wait=pauses.append))
    monkeypatch.setattr(module, "run_on_connection", send)
    client: Any = SimpleNamespace(get=lambda key: f"value of {key}", client=lambda: nullcontext("connection"))

    def ask() -> Steps[list[Any]]:
        value = yield lambda client: client.get("a")
        yield Pause(1.5)
        replies = yield OnOneConnection((("LPUSH", "k"), ("WAIT", 1)))
        return [value, replies]

    assert run(client, ask()) == ["value of a", [1, 2]]
    assert pauses == [1.5]
    assert sent == [("connection", ("LPUSH", "k")), ("connection", ("WAIT", 1))]


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("x")])
def test_error_is_raised_at_its_call(error: Exception) -> None:
    """The steps may go on after it, or let it pass; any other error ends them."""
    answers = [error, 7, error, KeyError("a defect")]

    def take() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    ended: list[str] = []

    def ask() -> Steps[int]:
        try:
            yield lambda client: client.take()
        except type(error):
            ended.append("first")
        try:
            return int((yield lambda client: client.take()))
        finally:
            ended.append("second")

    client: Any = SimpleNamespace(take=take)
    assert run(client, ask()) == 7
    with pytest.raises(KeyError):
        run(client, ask())
    assert ended == ["first", "second"] * 2


def test_pages_are_read_until_there_is_none() -> None:
    """An empty one is not the last."""
    pages = [[1, 2], [], [3], None]

    def next_steps() -> Steps[list[int] | None]:
        yield from ()
        return pages.pop(0)

    no_client: Any = None
    assert list(iterate(no_client, next_steps)) == [1, 2, 3]
