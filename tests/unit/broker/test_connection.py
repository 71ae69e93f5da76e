"""A client of a server that has become a replica."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.broker.connection import connect
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
