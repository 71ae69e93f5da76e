"""The connection that listens, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.aio import subscription as module
from shiwu.aio.subscription import Subscription
from shiwu.broker.sharding import ONE_SERVER, Shard, cluster_shard
from shiwu.client.waiter import CHUNK_SIZE
from shiwu.contract import result_key
from tests.support.clock import Clock


class Parts:
    """A subscription over a connection that keeps what is sent, and gives these messages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, shard: Shard = ONE_SERVER) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        self.sent: list[tuple[Any, ...]] = []
        self.messages: list[Any] = []
        self.released = 0
        connection = SimpleNamespace(send_command=self._send, read_response=self._read, disconnect=self._disconnect)
        self.connection = connection
        self.error: Exception | None = None

        async def get_connection() -> Any:
            return connection

        pool = SimpleNamespace(connection_kwargs={"shard": shard}, get_connection=get_connection, release=self._release)
        client: Any = SimpleNamespace(connection_pool=pool)
        self.subscription = Subscription(client, timeout_s=5.0)

    async def _send(self, *command: Any, check_health: bool) -> None:
        assert not check_health
        self.sent.append(command)

    async def _read(self, **options: Any) -> Any:
        assert not options["disconnect_on_error"]
        return self.messages.pop(0)

    async def _disconnect(self, *, nowait: bool) -> None:
        assert nowait
        if self.error is not None:
            raise self.error

    async def _release(self, connection: Any) -> None:
        assert connection is self.connection
        self.released += 1


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A subscription that is not open yet."""
    return Parts(monkeypatch)


def test_ids_are_subscribed_in_portions(parts: Parts) -> None:
    """And unsubscribed; nothing is sent for no id."""

    async def test() -> None:
        await parts.subscription.open()
        await parts.subscription.add([f"j{n}" for n in range(CHUNK_SIZE + 1)])
        await parts.subscription.add([])
        await parts.subscription.remove(["a"])

    asyncio.run(test())
    assert [(command[0], len(command) - 1) for command in parts.sent] == [
        ("SUBSCRIBE", CHUNK_SIZE),
        ("SUBSCRIBE", 1),
        ("UNSUBSCRIBE", 1),
    ]
    assert parts.sent[2][1] == result_key("a")


def test_only_announcements_are_read(parts: Parts) -> None:
    """Confirmations and replies to pings announce no answer."""
    parts.messages = [
        [b"subscribe", b"x", 1],
        [b"message", result_key("a").encode(), b"raw"],
        [b"pong", b""],
        b"PONG",
    ]

    async def test() -> list[Any]:
        await parts.subscription.open()
        return [await parts.subscription.read() for _ in range(4)]

    assert asyncio.run(test()) == [None, ("a", b"raw"), None, None]


def test_end_that_the_server_chose_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shard: its slot has moved. One that this client asked for is none, each time."""
    parts = Parts(monkeypatch, shard=cluster_shard(1))
    end = [b"sunsubscribe", result_key("a").encode(), 0]

    async def test() -> None:
        await parts.subscription.open()
        for _ in range(2):
            await parts.subscription.add(["a"])
            await parts.subscription.remove(["a"])
        parts.messages = [end, end, [b"smessage", result_key("b").encode(), b"raw"], end]
        assert [await parts.subscription.read() for _ in range(3)] == [None, None, ("b", b"raw")]
        with pytest.raises(redis.ConnectionError, match="moved"):
            await parts.subscription.read()
        parts.messages = [end]
        await parts.subscription.open()
        await parts.subscription.remove(["a"])
        assert await parts.subscription.read() is None

    asyncio.run(test())
    assert {command[0] for command in parts.sent} == {"SSUBSCRIBE", "SUNSUBSCRIBE"}


def test_silent_connection_is_an_error(parts: Parts) -> None:
    """A connection may be lost without a sign of it; anything that is read counts as a reply."""

    async def test() -> None:
        await parts.subscription.open()
        await parts.subscription.ping()
        parts.clock.now_s += 4.9
        await parts.subscription.ping()
        parts.messages = [b"PONG"]
        await parts.subscription.read()
        await parts.subscription.ping()
        assert parts.sent == [("PING",)] * 2
        parts.clock.now_s += 5.0
        with pytest.raises(redis.TimeoutError, match="within 5 s"):
            await parts.subscription.ping()
        await parts.subscription.close()
        await parts.subscription.open()
        await parts.subscription.ping()

    asyncio.run(test())
    assert parts.sent == [("PING",)] * 3


@pytest.mark.parametrize("error", [None, redis.ConnectionError("x"), OSError("x")])
def test_closed_connection_returns_to_its_pool(parts: Parts, error: Exception | None) -> None:
    """Once, also where it fails to close."""
    parts.error = error

    async def test() -> None:
        await parts.subscription.close()
        await parts.subscription.open()
        assert parts.subscription.is_open
        await parts.subscription.close()
        assert not parts.subscription.is_open
        await parts.subscription.close()

    asyncio.run(test())
    assert parts.released == 1
