"""The results stream, read by the consumers of a group: each answer is delivered to one of them until it acknowledges.

A consumer that crashes or hangs keeps what it was given; another one takes it over when it was idle for long enough.
What a consumer was given and has not worked on yet counts as idle only from the moment at which its loop asks for it.
"""

from __future__ import annotations

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
from shiwu.client.stream_items import EntryReader, Outage, StreamItem, UnreadableItem, log
from shiwu.contract import RESULT_STREAM

GONE: Final = ("NOGROUP", "UNBLOCKED")
GONE_PAUSE_S: Final = 0.1
HOLD_SHARE: Final = 0.1
"""Entries are held again when they were last held longer ago than this share of `reclaim_idle_s`."""
GIVEN_UP_MS: Final = 10 * 86_400_000
"""Idle time of an entry that its consumer gives up: longer than any consumer waits before it takes the entry over."""
FORGET_CONSUMER_S: Final = 3600.0
TIDY_EVERY_S: Final = 600.0
MIN_WAIT_S: Final = 0.5
"""How long one read blocks while entries that others hold are waited for."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How one consumer reads."""

    group: str
    consumer: str
    is_temporary: bool
    """The name was made for this loop alone, and the consumer is removed at its end if it holds nothing."""
    batch: int
    block_s: float
    reclaim_idle_s: float
    stop_when_idle: bool
    away_s: float | None
    """How long Redis may be away before its error is raised; None: for ever."""
    on_unreadable: Callable[[UnreadableItem], None]


def follow(client: redis.Redis, acks: redis.Redis, options: StreamOptions) -> Iterator[StreamItem]:
    """Yield entries: first what this consumer had not acknowledged, then new ones and those of crashed consumers.

    Args:
        client: reads; it must not try again by itself, since a second read would deliver other entries.
        acks: what items acknowledge with.
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
    """Reads one consumer's entries. After an error the same may be asked again: nothing that was delivered is lost."""

    def __init__(self, client: redis.Redis, items: EntryReader, options: StreamOptions) -> None:
        self._client = client
        self._items = items
        self._options = options
        self._hold = load_script(client, "hold_entries")
        self._drop = load_script(client, "drop_consumers")
        self._refused: set[str] = set()
        self._tidied_s = float("-inf")
        self._held_s = 0.0
        self._handed_out: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Begin with the stream as it is now."""
        self._has_group = False
        self._own_after: str | None = "0-0"
        """Where the consumer's own pending entries are read from; None once all of them were read."""
        self._newest = (0, 0)
        self._cursor = "0-0"
        self._is_claiming = True
        self._has_claimed = False
        self._wait_until: str | None = None
        """The newest entry that others held when this consumer had nothing more to read."""
        self.is_at_end = False

    # -------------------------------------------------------------------------------- reading
    def read(self) -> list[StreamItem]:
        """The next portion; empty where a read brought nothing."""
        if not self._has_group:
            self._make_group()
        self._tidy()
        self._held_s = time.monotonic()
        if self._own_after is not None:
            entries = self._read_group(self._own_after)
            found = self._take(entries)
            self._own_after = entries[-1][0].decode() if entries else None
            return found
        # In turn: entries of crashed consumers, then new ones.
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
        found = self._items.of(entries)
        self._newest = max([self._newest, *(_order(entry_id) for entry_id, _ in entries)])
        return found

    def _others_hold_nothing(self) -> bool:
        """Whether no other consumer holds an entry that was pending when this one had nothing more to read.

        Such entries are acknowledged by their consumers, or come here when they have been idle for long enough.
        """
        options = self._options
        reply: Any = self._permitted("xpending", lambda: self._client.xpending(RESULT_STREAM, options.group))
        if not reply or not reply["pending"]:
            return True
        others = [one["name"] for one in reply["consumers"] if one["name"] != options.consumer.encode()]
        until = self._wait_until or reply["max"].decode()
        with self._client.pipeline(transaction=False) as pipe:
            for name in others:
                pipe.xpending_range(RESULT_STREAM, options.group, min="-", max=until, count=1, consumername=name)
            held: list[Any] = pipe.execute()
        holders = [name.decode(errors="replace") for name, found in zip(others, held, strict=True) if found]
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
        """Note an item that the loop got. One that ends when it is idle gets each once, or it might never end."""
        if self._options.stop_when_idle:
            self._handed_out.add(item.entry_id)

    def hold(self, portion: list[StreamItem]) -> list[StreamItem]:
        """What of a portion is still this consumer's; its idle time begins anew, unless it began just now."""
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
        """What a call gives; None where this user may not make it, as with an ACL of an older version."""
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

    def _tidy(self) -> None:
        """Remove consumers that hold nothing and have been idle for long, as those of processes that have ended."""
        if time.monotonic() - self._tidied_s < TIDY_EVERY_S:
            return
        self._tidied_s = time.monotonic()
        idle_ms = int(max(FORGET_CONSUMER_S, 2 * self._options.reclaim_idle_s) * 1000)
        self._permitted("drop_consumers", lambda: self._drop_consumers("", idle_ms=idle_ms))

    def _drop_consumers(self, name: str, *, idle_ms: int) -> Any:
        return self._drop(keys=[RESULT_STREAM], args=[self._options.group, name, idle_ms])

    def failed(self, error: Exception) -> bool:
        """Prepare for the next try; whether it may follow without a pause."""
        # In the error of a script, Redis 6.2 has the word behind its own.
        is_gone = isinstance(error, redis.ResponseError) and any(word in str(error) for word in GONE)
        if is_gone:
            log.warning("the group %s of %s is gone; it is made anew", self._options.group, RESULT_STREAM)
            self._forget()
            # No other consumer can get what was read before, so it is still delivered.
            self._held_s = float("inf")
            Event().wait(GONE_PAUSE_S)
        elif self._own_after is None:
            # The reply that was lost may have delivered entries, all of them newer than what came before.
            self._own_after = f"{self._newest[0]}-{self._newest[1]}"
        return is_gone

    def leave(self, portion: Sequence[StreamItem]) -> None:
        """Give up what was not asked for, and remove a consumer that was made for this loop alone."""
        with suppress(redis.RedisError, OSError):
            if portion:
                self._permitted("hold_entries", lambda: self._set_idle(portion, idle_ms=GIVEN_UP_MS))
            if self._options.is_temporary and self._has_group:
                self._permitted("drop_consumers", lambda: self._drop_consumers(self._options.consumer, idle_ms=0))


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
