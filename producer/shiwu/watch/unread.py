"""Keeps the newest messages that could not be read in Redis, for an operator to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.answers import wait_replicated
from shiwu.broker.connection import run_on_connection
from shiwu.contract import WATCH_UNREAD

MAX_UNREAD: Final = 1000
REPLICAS_TIMEOUT_S: Final = 2.5
"""Less than the time-out of the connection."""
MAX_KEPT_CHARS: Final = 4096
"""Characters of a message that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadMessage:
    """A message that could not be read, or one with a record that could not."""

    source: str
    """Where it came from, without a password."""
    reason: str
    body: str

    def to_json(self, *, at_ms: float) -> bytes:
        """As it is kept; `at_ms` is Redis' clock."""
        record = {
            "at_ms": int(at_ms),
            "source": self.source,
            "reason": self.reason,
            "length": len(self.body),
            "body": self.body[:MAX_KEPT_CHARS],
        }
        return msgspec.json.encode(record)


def keep_unread(client: redis.Redis, messages: Sequence[UnreadMessage], *, at_ms: float, replicas: int = 0) -> None:
    """Keep these messages, the last of them as the newest; the oldest beyond `MAX_UNREAD` go.

    Args:
        replicas: how many replicas must confirm it.

    Raises:
        NotReplicated: they are kept, but too few replicas confirmed it.
        redis.RedisError: repeating the call may keep a message twice.
    """
    written = [message.to_json(at_ms=at_ms) for message in messages[-MAX_UNREAD:]]
    # WAIT counts only the writes of its own connection.
    with client.client() as connected:  # type: ignore[no-untyped-call]  # redis' own
        run_on_connection(connected, ("LPUSH", WATCH_UNREAD, *written), ("LTRIM", WATCH_UNREAD, 0, MAX_UNREAD - 1))
        if replicas:
            wait_replicated(connected, replicas=replicas, timeout_s=REPLICAS_TIMEOUT_S)


def read_unread(client: redis.Redis) -> list[bytes]:
    """What is kept, newest first, each as one line of JSON."""
    found: Any = client.lrange(WATCH_UNREAD, 0, MAX_UNREAD - 1)
    return [bytes(line) for line in found]


def as_text(raw: bytes | str) -> str:
    """The message as text; bytes that are no UTF-8 are escaped."""
    return raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
