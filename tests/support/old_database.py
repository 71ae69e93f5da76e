"""Loads a database that an earlier version has left, from `tests/data/old_names`, into any server."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

import redis

DATA: Final = Path(__file__).resolve().parents[1] / "data/old_names/database.json"
AGE_MS: Final = 2 * 3_600_000
"""Its leases and delays are over. Scores of sorted sets are times; results keep what they had left to live."""


def load_old_database(client: redis.Redis) -> list[str]:
    """Write its keys, as if it had been left two hours ago; return the ids of all jobs that were enqueued there."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    time: Any = client.time()
    shift_ms = time[0] * 1000 - found["made_ms"] - AGE_MS
    for key in found["keys"]:
        _write(client, key, shift_ms=shift_ms)
    return list(found["ids"])


def _raw(value: Any) -> bytes:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else str(value).encode()


def _write(client: redis.Redis, found: dict[str, Any], *, shift_ms: int) -> None:
    key, value = _raw(found["key"]), found["value"]
    match found["type"]:
        case "string":
            client.set(key, _raw(value))
        case "hash":
            client.hset(key, mapping={_raw(field): _raw(each) for field, each in value})
        case "list":
            client.rpush(key, *map(_raw, value))
        case "set":
            client.sadd(key, *map(_raw, value))
        case "zset":
            client.zadd(key, {_raw(member): score + shift_ms for member, score in value})
        case "stream":
            for entry, fields in value:
                client.xadd(key, {_raw(name): _raw(each) for name, each in fields}, id=entry)
            for name, last in found["groups"]:
                client.xgroup_create(key, name, id=last)
    if ttl_ms := found.get("ttl_ms"):
        client.pexpire(key, ttl_ms)
