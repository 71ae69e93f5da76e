"""MinIO's access format: a list in Redis, from which several watchers may read.

A watcher moves messages to a list of its own, and removes them there once their jobs are enqueued. What a crashed
watcher took goes back to the list, when the watcher starts again under its name or was not seen for `TAKEOVER_S`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final

import redis

from shiwu.broker.script_loader import load_script
from shiwu.watch.formats import read_message
from shiwu.watch.intake import Message
from shiwu.watch.keys import taken_key, watchers_key
from shiwu.watch.sources.base import Taken
from shiwu.watch.sources.redis_errors import source_errors

TAKEOVER_S: Final = 60.0
"""A watcher that was not seen for so long counts as crashed."""
SEEN_EVERY_S: Final = 5.0
SEARCH_EVERY_S: Final = 15.0
RETURN_AT_ONCE: Final = 1000


class RedisList:
    """The list `key`, read by the watcher `watcher`."""

    def __init__(
        self, client: redis.Redis, *, key: str, name: str, watcher: str, takeover_s: float = TAKEOVER_S
    ) -> None:
        self.name = name
        self._client = client
        self._key = key
        self._watcher = watcher
        self._taken = taken_key(key, watcher)
        self._watchers = watchers_key(key)
        self._takeover_s = takeover_s
        self._return = load_script(client, "return_taken", package="shiwu.watch")
        self._may_hold = True
        """Whether the list of this watcher may hold messages of an earlier run, or of a reply that was lost."""
        self._seen_s = self._searched_s = -math.inf

    def check(self) -> str:
        """How many messages wait."""
        with source_errors(self.name):
            return f"{self._client.llen(self._key)} messages wait"

    def take(self, count: int, *, wait_s: float) -> Sequence[Taken[bytes]]:
        """Move messages to the list of this watcher."""
        with source_errors(self.name):
            self._say_seen()
            self._return_others()
            raws = self._left_over(count) or self._move(count, wait_s=wait_s)
        return [(raw, Message(raw, read_message(raw))) for raw in raws]

    def keep(self, taken: Sequence[Taken[bytes]]) -> None:
        """Say that this watcher runs."""
        with source_errors(self.name):
            self._say_seen()

    def done(self, taken: Sequence[Taken[bytes]]) -> None:
        """Remove the messages from the list of this watcher."""
        may_hold, self._may_hold = self._may_hold, True
        with source_errors(self.name), self._client.pipeline(transaction=False) as pipe:
            for raw, _ in taken:
                pipe.lrem(self._taken, 1, raw)  # type: ignore[arg-type]  # bytes are values too
            pipe.execute()
        self._may_hold = may_hold

    def give_back(self, taken: Sequence[Taken[bytes]]) -> None:
        """Move the messages back to the head of the list, in their order."""
        with source_errors(self.name), self._client.pipeline(transaction=True) as pipe:
            for raw, _ in reversed(taken):
                pipe.lrem(self._taken, 1, raw)  # type: ignore[arg-type]  # bytes are values too
                pipe.lpush(self._key, raw)
            pipe.execute()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _left_over(self, count: int) -> list[bytes]:
        if not self._may_hold:
            return []
        found: Any = self._client.lrange(self._taken, 0, count - 1)
        self._may_hold = bool(found)
        return list(found)

    def _move(self, count: int, *, wait_s: float) -> list[bytes]:
        self._may_hold = True
        raws: list[bytes] = []
        if waiting := min(count, self._client.llen(self._key)):
            with self._client.pipeline(transaction=False) as pipe:
                for _ in range(waiting):
                    pipe.lmove(self._key, self._taken, "LEFT", "RIGHT")
                raws = [raw for raw in pipe.execute() if raw is not None]
        elif wait_s > 0:
            raw: Any = self._client.blmove(self._key, self._taken, wait_s, "LEFT", "RIGHT")  # type: ignore[arg-type]  # fractions too
            raws = [] if raw is None else [raw]
        self._may_hold = False
        return raws

    def _server_ms(self) -> int:
        seconds, microseconds = self._client.time()
        return int(seconds * 1000 + microseconds // 1000)

    def _say_seen(self) -> None:
        if time.monotonic() - self._seen_s >= min(SEEN_EVERY_S, self._takeover_s / 4):
            self._client.zadd(self._watchers, {self._watcher: self._server_ms()})
            self._seen_s = time.monotonic()
            # The server may run a BLMOVE of a connection that it does not know to be lost.
            self._may_hold = True

    def _return_others(self) -> None:
        """Return what watchers took that were not seen for too long."""
        if time.monotonic() - self._searched_s < min(SEARCH_EVERY_S, self._takeover_s / 2):
            return
        latest_ms = self._server_ms() - int(self._takeover_s * 1000)
        found: Any = self._client.zrangebyscore(self._watchers, "-inf", latest_ms, start=0, num=100)
        for member in found:
            name = member.decode(errors="surrogateescape")
            keys = [self._key, taken_key(self._key, name), self._watchers]
            while self._return(keys=keys, args=[member, latest_ms, RETURN_AT_ONCE]) == RETURN_AT_ONCE:
                pass
        self._searched_s = time.monotonic()
