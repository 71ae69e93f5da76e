"""MinIO's namespace format: a hash in Redis with the newest event of each object.

The watcher deletes a field once its job is enqueued, unless MinIO has written a newer event there. So the hash must be
a target of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import redis

from shiwu.broker.script_loader import load_script
from shiwu.watch.formats import read_message
from shiwu.watch.intake import Message
from shiwu.watch.sources.base import Taken
from shiwu.watch.sources.redis_errors import source_errors

Field = tuple[bytes, bytes]
"""A field of the hash and its value."""


class RedisHash:
    """The hash `key`. Several watchers may read it, and enqueue an event twice then, under one id."""

    def __init__(self, client: redis.Redis, *, key: str, name: str, stop: threading.Event) -> None:
        self.name = name
        self._client = client
        self._key = key
        self._stop = stop
        self._forget = load_script(client, "forget_fields", package="shiwu.watch")
        self._cursor = 0
        self._found: list[Field] = []

    def check(self) -> str:
        """How many objects wait."""
        with source_errors(self.name):
            return f"{self._client.hlen(self._key)} objects wait"

    def take(self, count: int, *, wait_s: float) -> Sequence[Taken[Field]]:
        """Read fields. No command waits for a change of a hash, so an empty one is read again after `wait_s`."""
        with source_errors(self.name):
            self._read(count)
            if not self._found and wait_s > 0:
                self._stop.wait(wait_s)
                self._read(count)
        fields, self._found = self._found[:count], self._found[count:]
        return [(field, Message(field[1], read_message(field[1]))) for field in fields]

    def _read(self, count: int) -> None:
        """Read on to the next fields, or to the end of the hash. A reply may have more fields than asked for."""
        while not self._found:
            reply: Any = self._client.hscan(self._key, self._cursor, count=count)
            self._cursor, fields = reply
            self._found = list(fields.items())
            if self._cursor == 0:
                return

    def keep(self, taken: Sequence[Taken[Field]]) -> None:
        """Do nothing: fields stay where they are until they are done."""

    def done(self, taken: Sequence[Taken[Field]]) -> None:
        """Delete the fields that still have the value that was read."""
        args = [part for field, _ in taken for part in field]
        with source_errors(self.name):
            self._forget(keys=[self._key], args=args)

    def give_back(self, taken: Sequence[Taken[Field]]) -> None:
        """Do nothing, as in `keep`."""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
