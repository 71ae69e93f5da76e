"""Connections of the asyncio client, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection

from shiwu.aio.connection import _greet, close, connect
from shiwu.broker.redis_errors import ConnectionsBusy, NotOneServer


@pytest.mark.parametrize(
    ("is_greeted", "reply", "mode"),
    [
        (False, {b"mode": b"standalone"}, None),
        (False, [b"server", b"redis", b"mode", b"standalone"], None),
        (False, redis.ResponseError("unknown command"), None),
        (False, {b"mode": b"cluster"}, "cluster"),
        (False, [b"mode", b"sentinel"], "sentinel"),
        (True, {b"mode": b"standalone"}, None),
        (True, {b"mode": b"cluster"}, "cluster"),
    ],
)
def test_cluster_and_sentinel_are_refused(is_greeted: bool, reply: Any, mode: str | None) -> None:
    """By the greeting of their login, or of a HELLO after it; a proxy without HELLO is accepted."""
    done: list[Any] = []

    async def login(*, check_health: bool) -> None:
        done.append(check_health)
        if is_greeted:
            await connection.read_response()

    async def send(*command: str, check_health: bool) -> None:
        done.append((command, check_health))

    async def read() -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    connection = SimpleNamespace(on_connect_check_health=login, send_command=send, read_response=read)
    if mode is None:
        asyncio.run(_greet(connection))
    else:
        with pytest.raises(NotOneServer) as caught:
            asyncio.run(_greet(connection))
        assert caught.value.mode == mode
    assert done == [False, *([] if is_greeted else [(("HELLO",), False)])]
    assert connection.read_response is read


@pytest.mark.parametrize(
    ("url", "kind", "options"),
    [
        ("redis://u:p@h:7/3", None, {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p"}),
        ("unix:///tmp/x?db=2", UnixDomainSocketConnection, {"path": "/tmp/x", "db": 2}),  # noqa: S108 never opened
        ("rediss://h", SSLConnection, {"host": "h", "port": 6379}),
    ],
    ids=["tcp", "socket", "tls"],
)
def test_url_becomes_arguments_with_limits(url: str, kind: type | None, options: dict[str, Any]) -> None:
    """Every wait has one."""
    [client] = connect(url, timeout_s=2.0, retries=3, max_connections=7)
    pool: Any = client.connection_pool
    if kind is not None:
        assert pool.connection_class is kind
    kwargs = pool.connection_kwargs
    assert {name: kwargs[name] for name in options} == options
    assert (kwargs["socket_timeout"], kwargs["socket_connect_timeout"]) == (2.0, 2.0)
    assert (pool.max_connections, pool.timeout, kwargs["retry"].get_retries()) == (7, 2.0, 3)


def test_pool_without_a_free_connection_says_what_to_change() -> None:
    """An error of the server stays that error."""

    async def test() -> None:
        [client] = connect("redis://127.0.0.1:1", timeout_s=0.05, max_connections=1)
        with pytest.raises(redis.ConnectionError) as away:
            await client.ping()
        assert not isinstance(away.value, ConnectionsBusy)
        pool: Any = client.connection_pool
        pool.get_available_connection()
        with pytest.raises(ConnectionsBusy, match="expected one of 1 connections"):
            await client.ping()
        await close(client)

    asyncio.run(test())
