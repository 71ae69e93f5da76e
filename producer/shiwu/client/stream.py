"""Reads the results stream as a consumer of a group. Each answer goes to one consumer, until it is acknowledged.

Another consumer takes over the entries of a consumer that crashed or hangs, once they have been idle long enough. The
idle time of an entry starts when the loop gets it, not when it was read.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import redis
from redis.exceptions import NoPermissionError

from shiwu.broker.redis_errors import explain
from shiwu.broker.script_loader import load_script
from shiwu.client.arguments import read_integer, read_seconds, read_text
from shiwu.client.stream_items import EntryReader, Outage, StreamItem, UnreadableItem, log
from shiwu.contract import RESULT_STREAM, printable

GROUP_GONE_WORDS: Final = ("NOGROUP", "UNBLOCKED")
"""Words in Redis' error when the group or the stream was deleted."""
GROUP_GONE_PAUSE_S: Final = 0.1
HOLD_SHARE: Final = 0.1
"""The idle time of held entries is reset after this share of `reclaim_idle_s`."""
GIVEN_UP_MS: Final = 10 * 86_400_000
"""Idle time set on an entry that its consumer gives up, so that the next consumer takes it over immediately."""
CONSUMER_TTL_S: Final = 3600.0
"""Idle time after which a consumer without entries is removed from the group."""
CLEANUP_EVERY_S: Final = 600.0
MIN_WAIT_S: Final = 0.5
"""Shortest block of a read while the loop waits for entries that other consumers hold."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How one consumer reads; durations are in seconds."""

    group: str
    consumer: str
    is_temporary: bool
    """The name is only for this loop; the consumer is removed at its end if it holds nothing."""
    batch: int
    block_s: float
    reclaim_idle_s: float
    stop_when_idle: bool
    away_s: float | None
    """How long Redis may be unavailable before its error is raised; None: forever."""
    on_unreadable: Callable[[UnreadableItem], None]


def read_options(
    *,
    group: str,
    consumer: str | None,
    batch: int,
    block_s: float,
    max_block_s: float,
    reclaim_idle_s: float,
    stop_when_idle: bool,
    away_s: float | None,
    on_unreadable: Callable[[UnreadableItem], None],
) -> StreamOptions:
    """Check the arguments of `Client.results`; without `consumer` a new name is made.

    Raises:
        RequestError: an argument is invalid.
    """
    new_name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return StreamOptions(
        group=read_text("group", group, least=1),
        consumer=new_name if consumer is None else read_text("consumer", consumer, least=1),
        is_temporary=consumer is None,
        batch=read_integer("batch", batch, least=1),
        block_s=min(read_seconds("block_s", block_s), max_block_s),
        reclaim_idle_s=read_seconds("reclaim_idle_s", reclaim_idle_s),
        stop_when_idle=stop_when_idle,
        away_s=None if away_s is None else read_seconds("away_s", away_s),
        on_unreadable=on_unreadable,
    )


def follow(client: redis.Redis, acks: redis.Redis, options: StreamOptions) -> Iterator[StreamItem]:
    """Yield entries: first those that this consumer did not acknowledge, then new ones and those of crashed consumers.

    Args:
        client: reads entries. It must not retry by itself, because a repeated read would deliver other entries.
        acks: the client with which items acknowledge.
    """
    reader = _Reader(client, EntryReader(acks, group=options.group, on_unreadable=options.on_unreadable), options)
    outage = Outage(away_s=options.away_s)
    portion: list[StreamItem] = []
    try:
        while True:
            try:
                portion = reader.hold(portion or reader.read())
            except (redis.RedisError, OSError) as error:
                if not reader.failed(error):
                    outage.wait(error)
                continue
            outage.end()
            if portion:
                item = portion.pop(0)
                reader.handed_out(item)
                yield item
            elif reader.is_at_end:
                return
    finally:
        if not outage.is_on:
            reader.leave(portion)


class _Reader:
    """Reads the entries of one consumer. After an error, reading again loses no entry that was delivered."""

    def __init__(self, client: redis.Redis, items: EntryReader, options: StreamOptions) -> None:
        self._client = client
        self._items = items
        self._options = options
        self._hold = load_script(client, "hold_entries")
        self._drop = load_script(client, "drop_consumers")
        self._refused: set[str] = set()
        self._cleaned_s = float("-inf")
        self._held_s = 0.0
        self._handed_out: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Start again, as after the group was created."""
        self._has_group = False
        self._own_after: str | None = "0-0"
        """The id after which the consumer's own pending entries are read; None once all of them were read."""
        self._newest = (0, 0)
        self._cursor = "0-0"
        self._is_claiming = True
        self._has_claimed = False
        self._wait_until: str | None = None
        """The newest entry that other consumers held when this consumer had nothing more to read."""
        self.is_at_end = False

    # -------------------------------------------------------------------------------- reading
    def read(self) -> list[StreamItem]:
        """The next portion; empty where there is nothing to read."""
        if not self._has_group:
            self._make_group()
        self._remove_idle_consumers()
        self._held_s = time.monotonic()
        if self._own_after is not None:
            entries = self._read_group(self._own_after)
            found = self._take(entries)
            self._own_after = entries[-1][0].decode() if entries else None
            return found
        # Alternates between entries of crashed consumers and new ones.
        self._is_claiming = not self._is_claiming
        if not self._is_claiming:
            return self._claim()
        return self._read_new()

    def _claim(self) -> list[StreamItem]:
        options = self._options
        reply: Any = self._client.xautoclaim(
            RESULT_STREAM,
            options.group,
            options.consumer,
            min_idle_time=int(options.reclaim_idle_s * 1000),
            start_id=self._cursor,
            count=options.batch,
        )
        self._cursor = reply[0].decode()
        found = [item for item in self._take(reply[1]) if item.entry_id not in self._handed_out]
        self._has_claimed = bool(found) or self._cursor != "0-0"
        return found

    def _read_new(self) -> list[StreamItem]:
        block_s = self._options.block_s if self._wait_until is None else max(self._options.block_s, MIN_WAIT_S)
        entries = self._read_group(">", block_s=block_s)
        found = self._take(entries)
        if self._options.stop_when_idle and not entries and not self._has_claimed:
            self.is_at_end = self._others_hold_nothing()
        return found

    def _read_group(self, after: str, *, block_s: float = 0.0) -> list[Any]:
        options = self._options
        reply: Any = self._client.xreadgroup(
            options.group,
            options.consumer,
            {RESULT_STREAM: after},
            count=options.batch,
            block=max(1, int(block_s * 1000)) if block_s else None,
        )
        entries: list[Any] = reply[0][1] if reply else []
        return entries

    def _take(self, entries: Sequence[Any]) -> list[StreamItem]:
        found = self._items.read(entries)
        self._newest = max([self._newest, *(_order(entry_id) for entry_id, _ in entries)])
        return found

    def _others_hold_nothing(self) -> bool:
        """Whether no other consumer holds an entry that was pending when this one had nothing more to read.

        Such entries are acknowledged by their consumers, or come here once they have been idle long enough.
        """
        options = self._options
        reply: Any = self._permitted("xpending", lambda: self._client.xpending(RESULT_STREAM, options.group))
        if not reply or not reply["pending"]:
            return True
        others = [holder["name"] for holder in reply["consumers"] if holder["name"] != options.consumer.encode()]
        until = self._wait_until or reply["max"].decode()
        with self._client.pipeline(transaction=False) as pipe:
            for name in others:
                pipe.xpending_range(RESULT_STREAM, options.group, min="-", max=until, count=1, consumername=name)
            held: list[Any] = pipe.execute()
        holders = [printable(name.decode(errors="replace")) for name, found in zip(others, held, strict=True) if found]
        if holders and self._wait_until is None:
            log.warning(
                "waiting for answers that other consumers of group %s hold unacknowledged (%s); they are taken over "
                "%g s after their consumer was last active",
                options.group,
                ", ".join(holders[:10]),
                options.reclaim_idle_s,
            )
        self._wait_until = until
        return not holders

    # -------------------------------------------------------------------------------- holding
    def handed_out(self, item: StreamItem) -> None:
        """Record an item that the loop got, so that a loop that ends when idle gets each once and comes to its end."""
        if self._options.stop_when_idle:
            self._handed_out.add(item.entry_id)

    def hold(self, portion: list[StreamItem]) -> list[StreamItem]:
        """The items of a portion that this consumer still holds; resets their idle time if it is not recent."""
        if time.monotonic() - self._held_s <= self._options.reclaim_idle_s * HOLD_SHARE or not portion:
            return portion
        began_s = time.monotonic()
        held: Any = self._permitted("hold_entries", lambda: self._set_idle(portion, idle_ms=0))
        self._held_s = began_s
        ids = None if held is None else set(held)
        return [item for item in portion if ids is None or item.entry_id.encode() in ids]

    def _set_idle(self, portion: Sequence[StreamItem], *, idle_ms: int) -> Any:
        ids = [item.entry_id for item in portion]
        return self._hold(keys=[RESULT_STREAM], args=[self._options.group, self._options.consumer, idle_ms, *ids])

    def _permitted(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of a call; None where the Redis user may not make it, as with the ACL of an older version."""
        if what in self._refused:
            return None
        try:
            return call()
        except NoPermissionError as error:
            self._refused.add(what)
            log.warning("%s", explain(error))
        return None

    # -------------------------------------------------------------------------------- the group
    def _make_group(self) -> None:
        try:
            self._client.xgroup_create(RESULT_STREAM, self._options.group, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._has_group = True

    def _remove_idle_consumers(self) -> None:
        """Remove consumers that hold nothing and have long been idle, as those of processes that have ended."""
        if time.monotonic() - self._cleaned_s < CLEANUP_EVERY_S:
            return
        self._cleaned_s = time.monotonic()
        idle_ms = int(max(CONSUMER_TTL_S, 2 * self._options.reclaim_idle_s) * 1000)
        self._permitted("drop_consumers", lambda: self._drop_consumers("", idle_ms=idle_ms))

    def _drop_consumers(self, name: str, *, idle_ms: int) -> Any:
        return self._drop(keys=[RESULT_STREAM], args=[self._options.group, name, idle_ms])

    def failed(self, error: Exception) -> bool:
        """Prepare for the next read after an error; return whether it may follow without a pause."""
        # Redis 6.2 puts its own words before this one in the error of a script.
        is_gone = isinstance(error, redis.ResponseError) and any(word in str(error) for word in GROUP_GONE_WORDS)
        if is_gone:
            log.warning("the group %s of %s was deleted; creating it again", self._options.group, RESULT_STREAM)
            self._forget()
            # No other consumer can get entries that were read before, so this loop still delivers them.
            self._held_s = float("inf")
            Event().wait(GROUP_GONE_PAUSE_S)
        elif self._own_after is None:
            # The lost reply may have delivered entries, all newer than those that came before.
            self._own_after = f"{self._newest[0]}-{self._newest[1]}"
        return is_gone

    def leave(self, portion: Sequence[StreamItem]) -> None:
        """Give up the entries that the loop did not get, and remove a consumer that is only for this loop."""
        with suppress(redis.RedisError, OSError):
            if portion:
                self._permitted("hold_entries", lambda: self._set_idle(portion, idle_ms=GIVEN_UP_MS))
            if self._options.is_temporary and self._has_group:
                self._permitted("drop_consumers", lambda: self._drop_consumers(self._options.consumer, idle_ms=0))


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
