"""The results stream, read by the consumers of a group: each answer is delivered to one of them until it acknowledges.

A consumer that crashes or hangs keeps what it was given; another one takes it over when it was idle for long enough.
What a consumer was given and has not worked on yet counts as idle only from the moment at which its loop asks for it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import redis
from redis.exceptions import NoPermissionError

from shiwu.contract import RESULT_STREAM
from shiwu.ledger import load_script
from shiwu.redis_errors import explain, info_of
from shiwu.results import TagResult

MAX_REPORTED: Final = 10_000
"""Entries that cannot be read and are remembered, so that each is reported once."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
HOLD_SHARE: Final = 0.1
"""Entries are held again when they were last held longer ago than this share of `reclaim_idle_s`."""
GIVEN_UP_MS: Final = 10 * 86_400_000
"""Idle time of an entry that its consumer gives up: longer than anybody waits before taking it over."""
FORGET_CONSUMER_S: Final = 3600.0
TIDY_EVERY_S: Final = 600.0
LEAST_WAIT_S: Final = 0.5
"""How long one read blocks while entries that others hold are waited for."""
log: Final = logging.getLogger("shiwu")


@dataclass(frozen=True)
class StreamItem:
    """One entry of the results stream. It stays with this consumer until `ack`."""

    entry_id: str
    result: TagResult
    _client: redis.Redis
    _group: str

    def ack(self, *, away_s: float = 0.0) -> None:
        """Say that the answer has had its effect; it is not delivered to this group again.

        Args:
            away_s: how long to try again while Redis is away.

        Raises:
            redis.RedisError: Redis did not take it; the answer will be delivered again.
        """
        outage = _Outage(away_s=away_s)
        while True:
            try:
                self._client.xack(RESULT_STREAM, self._group, self.entry_id)
            except (redis.RedisError, OSError) as error:
                outage.wait(error)
            else:
                outage.end()
                return


@dataclass(frozen=True)
class UnreadableItem:
    """An entry of the results stream that this version of the client cannot read.

    It stays pending, so that the group gets it again after the client was upgraded; `ack` gives it up.
    """

    entry_id: str
    fields: Mapping[bytes, bytes]
    reason: str
    _client: redis.Redis
    _group: str

    def ack(self) -> None:
        """Give the entry up: it is not delivered to this group again."""
        self._client.xack(RESULT_STREAM, self._group, self.entry_id)


def log_unreadable(item: UnreadableItem) -> None:
    """Write a warning to the logger `shiwu`."""
    log.warning("entry %s of %s was skipped and stays pending: %s", item.entry_id, RESULT_STREAM, item.reason)


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
    reader = _Reader(client, _Items(acks, options), options)
    outage = _Outage(away_s=options.away_s)
    portion: list[StreamItem] = []
    try:
        while True:
            try:
                portion = portion or reader.read()
                if portion := reader.hold(portion):
                    item = portion.pop(0)
                elif reader.is_at_end:
                    return
                else:
                    continue
            except (redis.RedisError, OSError) as error:
                if not reader.failed(error):
                    outage.wait(error)
                continue
            outage.end()
            yield item
    finally:
        if not outage.is_on:
            reader.leave(portion)


class _Reader:
    """Reads one consumer's entries. After an error the same may be asked again: nothing that was delivered is lost."""

    def __init__(self, client: redis.Redis, items: _Items, options: StreamOptions) -> None:
        self._client = client
        self._items = items
        self._options = options
        self._hold = load_script(client, "hold_entries")
        self._drop = load_script(client, "drop_consumers")
        self._refused: set[str] = set()
        self._tidied_s = float("-inf")
        self._held_s = 0.0
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
            self._own_after = entries[-1][0].decode() if entries else None
            return self._take(entries)
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
        found = self._take(reply[1])
        self._has_claimed = bool(found) or self._cursor != "0-0"
        return found

    def _read_new(self) -> list[StreamItem]:
        block_s = self._options.block_s if self._wait_until is None else max(self._options.block_s, LEAST_WAIT_S)
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
        self._newest = max([self._newest, *(_order(entry_id) for entry_id, _ in entries)])
        return self._items.of(entries)

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
        """Prepare for the next try; whether it may follow at once."""
        is_gone = isinstance(error, redis.ResponseError) and str(error).startswith(("NOGROUP", "UNBLOCKED"))
        if is_gone:
            log.warning("the group %s of %s is gone; it is made anew", self._options.group, RESULT_STREAM)
            self._forget()
            # What was read before is nobody else's any more, and is still delivered.
            self._held_s = float("inf")
            Event().wait(FIRST_PAUSE_S)
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


class _Items:
    """Turns entries into items, and reports each entry that cannot be read once."""

    def __init__(self, client: redis.Redis, options: StreamOptions) -> None:
        self._client = client
        self._group = options.group
        self._on_unreadable = options.on_unreadable
        self._reported: OrderedDict[bytes, None] = OrderedDict()

    def of(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[StreamItem]:
        """The entries that can be read."""
        items = []
        for entry_id, fields in entries:
            if not fields:  # an entry that was trimmed away while pending has none
                self._client.xack(RESULT_STREAM, self._group, entry_id)
                continue
            try:
                items.append(StreamItem(entry_id.decode(), _read_entry(fields), self._client, self._group))
            except ValueError as error:
                self._report(entry_id, fields, str(error)[:300])
        return items

    def _report(self, entry_id: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        if entry_id not in self._reported:
            self._on_unreadable(UnreadableItem(entry_id.decode(), fields, reason, self._client, self._group))
        self._reported[entry_id] = None
        while len(self._reported) > MAX_REPORTED:
            self._reported.popitem(last=False)


class _Outage:
    """Pauses while Redis is away, growing and bounded, and says so once to the logger `shiwu`."""

    def __init__(self, *, away_s: float | None) -> None:
        self._away_s = away_s
        self._since_s: float | None = None
        self._pause_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether Redis has not answered since the last error."""
        return self._since_s is not None

    def wait(self, error: Exception) -> None:
        """Pause before the next try.

        Raises:
            redis.RedisError: the error, when it does not pass by itself, or has lasted for too long.
        """
        now_s = time.monotonic()
        since_s = now_s if self._since_s is None else self._since_s
        if not info_of(error).passes or (self._away_s is not None and now_s - since_s >= self._away_s):
            raise error
        if self._since_s is None:
            log.warning("%s; trying again", explain(error))
        self._since_s = since_s
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2 or FIRST_PAUSE_S)
        Event().wait(self._pause_s)

    def end(self) -> None:
        """Redis has answered."""
        if self._since_s is not None:
            log.warning("Redis answers again, after %.1f s", time.monotonic() - self._since_s)
        self._since_s, self._pause_s = None, 0.0


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _read_entry(fields: Mapping[bytes, bytes]) -> TagResult:
    """Read an entry of the results stream.

    Raises:
        ValueError: it has no answer, or one that this version cannot read.
    """
    if (raw := fields.get(b"answer")) is None:
        raise ValueError("expected a field `answer`, got none")
    return TagResult.from_json(raw)
