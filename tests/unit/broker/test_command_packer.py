"""Commands are packed as redis-py packs them."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from redis.connection import HiredisRespSerializer

from shiwu.broker.connection import connect


def _packer() -> Any:
    with connect("redis://localhost/0", timeout_s=1) as client:
        return client.connection_pool.make_connection()._command_packer


@pytest.mark.parametrize(
    "command",
    [
        ("EVALSHA", "0" * 40, 1, "键", b"\0\r\n", 2.5, -7),
        ("CLIENT SETINFO", "LIB-NAME", ""),
        (b"CONFIG GET", "save"),
        ("SET", "key", memoryview(b"value")),
        ("SET", "key", bytearray(b"value")),
    ],
)
def test_command_is_packed_as_by_redis_py(command: tuple[Any, ...]) -> None:
    assert _packer().pack(*command) == HiredisRespSerializer().pack(*command)


def test_packing_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(redis.DataError):
        _packer().pack("SET", "key", {"no": "value"})
