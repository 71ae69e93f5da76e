"""Steps with an asyncio client, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Self

import pytest
import redis

from shiwu.aio.run_steps import iterate, run
from shiwu.broker.steps import OnOneConnection, Pause, Steps


class Connected:
    """A client that holds one connection, and keeps what was sent on it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.connection = SimpleNamespace(pack_commands=list, send_packed_command=self._send, read_response=self._read)

    async def _send(self, commands: list[Any], *, check_health: bool) -> None:
        assert not check_health
        self.sent += commands

    async def _read(self) -> int:
        return len(self.sent)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


def test_steps_get_replies_and_give_their_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are awaited, pauses leave the loop free, and commands for one connection share it."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def get(key: str) -> str:
        return f"value of {key}"

    monkeypatch.setattr(asyncio, "sleep", sleep)
    connected = Connected()
    client: Any = SimpleNamespace(get=get, client=lambda: connected)

    def ask() -> Steps[list[Any]]:
        value = yield lambda client: client.get("a")
        yield Pause(1.5)
        replies = yield OnOneConnection((("LPUSH", "k"), ("WAIT", 1)))
        return [value, replies]

    assert asyncio.run(run(client, ask())) == ["value of a", [1, 2]]
    assert pauses == [1.5]
    assert connected.sent == [("LPUSH", "k"), ("WAIT", 1)]


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("x")])
def test_error_is_raised_at_its_call(error: Exception) -> None:
    """The steps may go on after it, or let it pass; a cancellation ends them."""
    answers: list[Any] = [error, 7, error, asyncio.CancelledError()]

    async def take() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
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
    assert asyncio.run(run(client, ask())) == 7
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run(client, ask()))
    assert ended == ["first", "second"] * 2


def test_pages_are_read_until_there_is_none() -> None:
    """An empty one is not the last."""
    pages = [[1, 2], [], [3], None]

    def next_steps() -> Steps[list[int] | None]:
        yield from ()
        return pages.pop(0)

    async def read() -> list[int]:
        no_client: Any = None
        return [value async for value in iterate(no_client, next_steps)]

    assert asyncio.run(read()) == [1, 2, 3]
