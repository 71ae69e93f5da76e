"""Connections: where they lead, how long they wait, and what is done with a server that is not the primary."""

from __future__ import annotations

from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.connection import BlockingConnectionPool
from redis.sentinel import SentinelConnectionPool

from shiwu.broker.connection import MAX_CONNECTIONS, _greet, connect, run_on_connection
from shiwu.broker.redis_errors import ConnectionsBusy, NotOneServer
from tests.support.processes import LOOPBACK


@pytest.mark.parametrize(("error", "is_disconnected"), [(redis.ReadOnlyError, True), (redis.ResponseError, False)])
def test_connection_to_a_replica_is_closed(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], *, is_disconnected: bool
) -> None:
    """The next connection looks the name up again, which may lead to the new primary. Other errors close nothing."""

    def fail(*_: Any, **__: Any) -> None:
        raise error("no")

    monkeypatch.setattr(redis.Redis, "parse_response", fail)
    closed: list[bool] = []
    connection = SimpleNamespace(disconnect=lambda: closed.append(True))
    with connect(f"redis://{LOOPBACK}:1", timeout_s=1.0) as client, pytest.raises(error):
        client.parse_response(connection, "SET")
    assert closed == [True] * is_disconnected


class Replies:
    """A connection that gives these replies, and keeps what is sent."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.sent: list[Any] = []
        self.handshake_metadata: Any = None

    def pack_commands(self, commands: Any) -> Any:
        """As they are."""
        return commands

    def send_packed_command(self, commands: Any, *, check_health: bool) -> None:
        """Keep them."""
        assert not check_health
        self.sent += commands

    def send_command(self, *command: Any, check_health: bool) -> None:
        """Keep it."""
        assert not check_health
        self.sent.append(command)

    def on_connect_check_health(self, *, check_health: bool) -> None:
        """Note it."""
        self.sent.append(("connected", check_health))

    def read_response(self) -> Any:
        """The next reply, or its error."""
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


REFUSED = redis.ResponseError("refused")
LATER = redis.ResponseError("later")


@pytest.mark.parametrize(
    ("replies", "commands", "results"),
    [
        ([7], [("WAIT", 1)], [7]),
        ([b"OK", b"QUEUED", b"QUEUED", [1, 2]], [("A",), ("B",)], [1, 2]),
    ],
)
def test_commands_run_on_the_connection(replies: list[Any], commands: list[Any], results: list[Any]) -> None:
    """One by itself, several in a transaction."""
    connection = Replies(*replies)
    connected: Any = SimpleNamespace(connection=connection)
    assert run_on_connection(connected, *commands) == results
    assert connection.replies == [], "a reply that is left would be taken for the next one"
    assert connection.sent == (commands if len(commands) == 1 else [("MULTI",), *commands, ("EXEC",)])


@pytest.mark.parametrize(
    ("replies", "commands", "error"),
    [
        ([REFUSED], [("WAIT", 1)], REFUSED),
        ([b"OK", REFUSED, b"QUEUED", LATER], [("A",), ("B",)], REFUSED),
        ([b"OK", b"QUEUED", b"QUEUED", LATER], [("A",), ("B",)], LATER),
        ([b"OK", b"QUEUED", b"QUEUED", [1, REFUSED]], [("A",), ("B",)], REFUSED),
        ([REFUSED, REFUSED, REFUSED, LATER], [("A",), ("B",)], REFUSED),
    ],
)
def test_first_error_of_commands_is_raised(replies: list[Any], commands: list[Any], error: Exception) -> None:
    """After all replies were read."""
    connection = Replies(*replies)
    connected: Any = SimpleNamespace(connection=connection)
    with pytest.raises(redis.ResponseError) as caught:
        run_on_connection(connected, *commands)
    assert caught.value is error
    assert connection.replies == []


@pytest.mark.parametrize(
    ("metadata", "replies", "mode"),
    [
        ({b"mode": b"standalone"}, [], None),
        ({b"mode": b"cluster"}, [], "cluster"),
        ([b"server", b"redis", b"mode", b"sentinel"], [], "sentinel"),
        (None, [[b"mode", b"cluster"]], "cluster"),
        (None, [{b"mode": b"standalone"}], None),
        (None, [redis.ResponseError("unknown command")], None),
        (None, [b"what?"], None),
        ({}, [], None),
    ],
)
def test_cluster_nodes_and_sentinels_are_refused(metadata: Any, replies: list[Any], mode: str | None) -> None:
    """By the mode of the greeting; a proxy that passes none on is a server."""
    connection = Replies(*replies)
    connection.handshake_metadata = metadata
    if mode is None:
        _greet(connection)
    else:
        with pytest.raises(NotOneServer, match=mode):
            _greet(connection)
    assert connection.sent == [("connected", False), *([("HELLO",)] if metadata is None else [])]


def options_of(client: redis.Redis) -> dict[str, Any]:
    """What its connections are made with, and the pool's own limits."""
    pool: Any = client.connection_pool
    return {**pool.connection_kwargs, "timeout": pool.timeout, "max_connections": pool.max_connections}


def test_client_limits_every_wait() -> None:
    """A blocking command may take its own time in addition; a client that is notified speaks RESP3."""
    with connect(f"redis://{LOOPBACK}:1", timeout_s=2.0) as client:
        plain = options_of(client)
    with connect(
        f"redis://{LOOPBACK}:1",
        timeout_s=2.0,
        block_s=5.0,
        has_pushes=True,
        retries=3,
        max_connections=4,
        pool_wait_s=0.0,
    ) as client:
        notified = options_of(client)
    times = ("socket_timeout", "socket_connect_timeout", "health_check_interval", "timeout", "max_connections")
    assert [plain[name] for name in times] == [2.0, 2.0, 30, 2.0, MAX_CONNECTIONS]
    assert [notified[name] for name in times] == [7.0, 2.0, 0, 0.0, 4]
    assert (plain.get("protocol"), notified["protocol"]) == (None, 3)
    assert (plain["retry"].get_retries(), notified["retry"].get_retries()) == (0, 3)
    assert 0.0 < notified["retry"]._backoff.compute(1) < notified["retry"]._backoff.compute(9) <= 1.0
    assert plain["retry"]._backoff.compute(9) == 0
    assert plain["socket_keepalive"] is True


@pytest.mark.parametrize(
    ("url", "kind", "expected"),
    [
        ("redis://u:p@h:7/3", "Connection", {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p"}),
        ("rediss://h:7", "SSLConnection", {"host": "h", "port": 7, "socket_keepalive": True}),
        ("unix:///run/redis.sock", "UnixDomainSocketConnection", {"path": "/run/redis.sock"}),
    ],
)
def test_place_and_login_are_those_of_the_url(url: str, kind: str, expected: dict[str, Any]) -> None:
    """With the kind of connection that it needs."""
    with connect(url, timeout_s=1.0) as client:
        assert client.connection_pool.connection_class.__name__ == kind
        found = options_of(client)
    assert {name: found[name] for name in expected} == expected


def test_sentinels_get_their_own_login() -> None:
    """Not that of the server; waits on them are limited too."""
    with connect("sentinel://u:p@a:1,b:2/primary/4", timeout_s=1.5) as client:
        pool: Any = client.connection_pool
        sentinels = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
        options = pool.connection_kwargs
    assert (pool.service_name, options["db"], options["socket_keepalive"]) == ("primary", 4, True)
    assert [(each["host"], each["port"], each["socket_timeout"]) for each in sentinels] == [
        ("a", 1, 1.5),
        ("b", 2, 1.5),
    ]


@pytest.mark.parametrize("is_all", [True, False])
def test_pool_of_sentinels_can_close_idle_connections(monkeypatch: pytest.MonkeyPatch, *, is_all: bool) -> None:
    """Or all of them; older versions of redis-py close all."""
    calls: list[str] = []
    monkeypatch.setattr(SentinelConnectionPool, "disconnect", lambda *_, **__: calls.append("all"), raising=False)
    with connect("sentinel://a:1/primary", timeout_s=1.0, max_connections=3) as client:
        pool: Any = client.connection_pool
        idle = SimpleNamespace(disconnect=lambda: calls.append("idle"))
        pool.pool = SimpleNamespace(queue=[None, idle, None])
        pool.disconnect(is_all)
        assert calls == (["all"] if is_all else ["idle"])
        monkeypatch.undo()
        pool.reset()


@pytest.mark.parametrize("cause", [Empty(), ValueError("another")])
def test_busy_pool_says_what_to_change(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    """Where no connection became free; any other error of a connection stays what it is."""

    def fail(_: Any) -> None:
        try:
            raise cause
        except type(cause):
            raise redis.ConnectionError("no connection") from None

    monkeypatch.setattr(BlockingConnectionPool, "get_connection", fail)
    with (
        connect(f"redis://{LOOPBACK}:1", timeout_s=1.0, max_connections=3) as client,
        pytest.raises(redis.ConnectionError) as caught,
    ):
        client.connection_pool.get_connection()
    assert isinstance(caught.value, ConnectionsBusy) is isinstance(cause, Empty)
    if isinstance(cause, Empty):
        assert "one of 3 connections to Redis to become free within 1 s" in str(caught.value)
