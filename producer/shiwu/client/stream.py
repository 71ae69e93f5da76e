"""Reads the results stream as a consumer of a group. Each answer goes to one consumer, until it is acknowledged.

Another consumer takes over the entries of a consumer that crashed or hangs, once they have been idle long enough. The
idle time of an entry starts when the loop gets it, not when it was read.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import redis
from redis.exceptions import NoPermissionError

from shiwu.broker.redis_errors import explain
from shiwu.broker.script_loader import call_script
from shiwu.broker.steps import Call, Pause, Steps
from shiwu.client.arguments import read_integer, read_seconds, read_text
from shiwu.client.stream_items import GIVEN_UP_MS, Entry, EntryReader, Outage, in_shard, log
from shiwu.contract import RESULT_STREAM, printable

GROUP_GONE_WORDS: Final = ("NOGROUP", "UNBLOCKED")
"""Words in Redis' error when the group or the stream was deleted."""
GROUP_GONE_PAUSE_S: Final = 0.1
HOLD_SHARE: Final = 0.1
"""The idle time of held entries is reset after this share of `reclaim_idle_s`."""
CONSUMER_TTL_S: Final = 3600.0
"""Idle time after which a consumer without entries is removed from the group."""
CLEANUP_EVERY_S: Final = 600.0
MIN_WAIT_S: Final = 0.5


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
    on_unreadable: Callable[[str, Mapping[bytes, bytes], str], None]
    """Gets the id, the fields and the reason of each entry that cannot be read."""
    min_wait_s: float = MIN_WAIT_S
    """Shortest wait of a read while a loop that stops when idle waits for entries that other consumers hold."""


def for_shard(options: StreamOptions, shard: int) -> StreamOptions:
    """The options for one of several shards: ids of entries that cannot be read begin with its index."""

    def report(entry_id: str, fields: Mapping[bytes, bytes], reason: str) -> None:
        options.on_unreadable(in_shard(shard, entry_id), fields, reason)

    return replace(options, on_unreadable=report)


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
    on_unreadable: Callable[[str, Mapping[bytes, bytes], str], None],
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
        min_wait_s=min(MIN_WAIT_S, max_block_s),
    )


class StreamLoop:
    """One loop over the results stream: `next_steps` until it gives None, then `leave_steps`.

    The client that runs the steps must not retry by itself, because a repeated read would deliver other entries.

    Args:
        shard: the index of the shard, for what is logged; None on one server.
    """

    def __init__(self, options: StreamOptions, *, shard: int | None = None) -> None:
        self._reader = StreamReader(options)
        self._outage = Outage(away_s=options.away_s, shard=shard)
        self._portion: list[Entry] = []

    def next_steps(self) -> Steps[Entry | None]:
        """The next entry: first those that this consumer did not acknowledge, then new ones and those of crashed ones.

        None at the end of a loop that stops when idle.
        """
        reader = self._reader
        while True:
            try:
                self._portion = self._portion or (yield from reader.read_steps())
                self._portion = yield from reader.hold_steps(self._portion)
            except (redis.RedisError, OSError) as error:
                pause = reader.failed(error) or self._outage.pause(error)
            else:
                self._outage.end()
                if self._portion:
                    entry = self._portion.pop(0)
                    reader.handed_out(entry)
                    return entry
                if reader.is_at_end:
                    return None
                continue
            yield pause

    def leave_steps(self) -> Steps[None]:
        """Give up what the loop did not get, unless Redis is unavailable."""
        if not self._outage.is_on:
            yield from self._reader.leave_steps(self._portion)


class StreamReader:
    """Reads the entries of one consumer. After an error, reading again loses no entry that was delivered."""

    def __init__(self, options: StreamOptions) -> None:
        self._items = EntryReader(group=options.group, on_unreadable=options.on_unreadable)
        self._options = options
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

    @property
    def has_group(self) -> bool:
        """Whether the group was there at the last read; otherwise the next read creates it."""
        return self._has_group

    def group_was_made(self) -> None:
        """Do not create the group at the first read: it is there, and if it is not any more, `failed` says so."""
        self._has_group = True

    # -------------------------------------------------------------------------------- reading
    def read_steps(self, *, block_s: float | None = None) -> Steps[list[Entry]]:
        """The next portion; empty where there is nothing to read.

        Args:
            block_s: how long to wait for new entries, instead of the time of the options; 0 does not wait.
        """
        if not self._has_group:
            yield from self._make_group_steps()
        yield from self._remove_idle_consumers_steps()
        self._held_s = time.monotonic()
        if self._own_after is not None:
            entries = yield from self._read_group_steps(self._own_after)
            found = yield from self._take_steps(entries)
            self._own_after = entries[-1][0].decode() if entries else None
            return found
        # Alternates between entries of crashed consumers and new ones.
        self._is_claiming = not self._is_claiming
        if not self._is_claiming:
            return (yield from self._claim_steps())
        if block_s is None:
            options = self._options
            block_s = max(options.block_s, options.min_wait_s) if self._wait_until else options.block_s
        return (yield from self._read_new_steps(block_s))

    def _claim_steps(self) -> Steps[list[Entry]]:
        options, cursor = self._options, self._cursor
        reply = yield lambda client: client.xautoclaim(
            RESULT_STREAM,
            options.group,
            options.consumer,
            min_idle_time=int(options.reclaim_idle_s * 1000),
            start_id=cursor,
            count=options.batch,
        )
        self._cursor = reply[0].decode()
        found = yield from self._take_steps(reply[1])
        found = [entry for entry in found if entry.id not in self._handed_out]
        self._has_claimed = bool(found) or self._cursor != "0-0"
        return found

    def _read_new_steps(self, block_s: float) -> Steps[list[Entry]]:
        entries = yield from self._read_group_steps(">", block_s=block_s)
        found = yield from self._take_steps(entries)
        if self._options.stop_when_idle and not entries and not self._has_claimed:
            self.is_at_end = yield from self._others_hold_nothing_steps()
        return found

    def _read_group_steps(self, after: str, *, block_s: float = 0.0) -> Steps[list[Any]]:
        options = self._options
        reply = yield lambda client: client.xreadgroup(
            options.group,
            options.consumer,
            {RESULT_STREAM: after},
            count=options.batch,
            block=max(1, int(block_s * 1000)) if block_s else None,
        )
        entries: list[Any] = reply[0][1] if reply else []
        return entries

    def _take_steps(self, entries: Sequence[Any]) -> Steps[list[Entry]]:
        found = yield from self._items.read_steps(entries)
        self._newest = max([self._newest, *(_order(entry_id) for entry_id, _ in entries)])
        return found

    def _others_hold_nothing_steps(self) -> Steps[bool]:
        """Whether no other consumer holds an entry that was pending when this one had nothing more to read.

        Such entries are acknowledged by their consumers, or come here once they have been idle long enough.
        """
        options = self._options
        reply = yield from self._permitted_steps(
            "xpending", lambda client: client.xpending(RESULT_STREAM, options.group)
        )
        if not reply or not reply["pending"]:
            return True
        others = [holder["name"] for holder in reply["consumers"] if holder["name"] != options.consumer.encode()]
        until = self._wait_until or reply["max"].decode()

        def find_first(client: Any) -> Any:
            pipe = client.pipeline(transaction=False)
            for name in others:
                pipe.xpending_range(RESULT_STREAM, options.group, min="-", max=until, count=1, consumername=name)
            return pipe.execute()

        held = yield find_first
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
    def handed_out(self, entry: Entry) -> None:
        """Record an entry that the loop got, so that a loop that ends when idle gets each once and comes to its end."""
        if self._options.stop_when_idle:
            self._handed_out.add(entry.id)

    def hold_steps(self, portion: list[Entry]) -> Steps[list[Entry]]:
        """The entries of a portion that this consumer still holds; resets their idle time if it is not recent."""
        if time.monotonic() - self._held_s <= self._options.reclaim_idle_s * HOLD_SHARE or not portion:
            return portion
        began_s = time.monotonic()
        held = yield from self._permitted_steps("hold_entries", self._set_idle(portion, idle_ms=0))
        self._held_s = began_s
        ids = None if held is None else set(held)
        return [entry for entry in portion if ids is None or entry.id.encode() in ids]

    def _set_idle(self, portion: Sequence[Entry], *, idle_ms: int) -> Call:
        ids = [entry.id for entry in portion]
        args = [self._options.group, self._options.consumer, idle_ms, *ids]
        return call_script("hold_entries", keys=[RESULT_STREAM], args=args)

    def _permitted_steps(self, what: str, call: Call) -> Steps[Any]:
        """The result of a call; None where the Redis user may not make it, as with the ACL of an older version."""
        if what in self._refused:
            return None
        try:
            return (yield call)
        except NoPermissionError as error:
            self._refused.add(what)
            log.warning("%s", explain(error))
        return None

    # -------------------------------------------------------------------------------- the group
    def _make_group_steps(self) -> Steps[None]:
        group = self._options.group
        try:
            yield lambda client: client.xgroup_create(RESULT_STREAM, group, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._has_group = True

    def _remove_idle_consumers_steps(self) -> Steps[None]:
        """Remove consumers that hold nothing and have long been idle, as those of processes that have ended."""
        if time.monotonic() - self._cleaned_s < CLEANUP_EVERY_S:
            return
        self._cleaned_s = time.monotonic()
        idle_ms = int(max(CONSUMER_TTL_S, 2 * self._options.reclaim_idle_s) * 1000)
        yield from self._permitted_steps("drop_consumers", self._drop_consumers("", idle_ms=idle_ms))

    def _drop_consumers(self, name: str, *, idle_ms: int) -> Call:
        return call_script("drop_consumers", keys=[RESULT_STREAM], args=[self._options.group, name, idle_ms])

    def failed(self, error: Exception) -> Pause | None:
        """Prepare for the next read after an error; return the pause before it where only the group is gone."""
        # Redis 6.2 puts its own words before this one in the error of a script.
        is_gone = isinstance(error, redis.ResponseError) and any(word in str(error) for word in GROUP_GONE_WORDS)
        if is_gone:
            log.warning("the group %s of %s was deleted; creating it again", self._options.group, RESULT_STREAM)
            self._forget()
            # No other consumer can get entries that were read before, so this loop still delivers them.
            self._held_s = float("inf")
            return Pause(GROUP_GONE_PAUSE_S)
        if self._own_after is None:
            # The lost reply may have delivered entries, all newer than those that came before.
            self._own_after = f"{self._newest[0]}-{self._newest[1]}"
        return None

    def leave_steps(self, portion: Sequence[Entry]) -> Steps[None]:
        """Give up the entries that the loop did not get, and remove a consumer that is only for this loop."""
        with suppress(redis.RedisError, OSError):
            if portion:
                yield from self._permitted_steps("hold_entries", self._set_idle(portion, idle_ms=GIVEN_UP_MS))
            if self._options.is_temporary and self._has_group:
                drop = self._drop_consumers(self._options.consumer, idle_ms=0)
                yield from self._permitted_steps("drop_consumers", drop)


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
