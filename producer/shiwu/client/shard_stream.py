"""Reads the results streams of several shards as one consumer. The order of answers holds within a shard only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import redis

from shiwu.broker.backoff import Backoff
from shiwu.broker.steps import Pause, Steps, on_shard, on_shards, run
from shiwu.client.stream import StreamLoop, StreamOptions, StreamReader, for_shard
from shiwu.client.stream_items import Entry, Outage, StreamItem, in_shard, shard_of_entry

FIRST_IDLE_S: Final = 0.01
MAX_IDLE_S: Final = 0.25
"""Pauses between two rounds over shards that have nothing to read."""
MAX_AWAY_S: Final = 10.0
"""Longest pause before a shard that is unavailable is asked again: a server that hangs costs a time-out each time."""


def make_loop(options: StreamOptions, *, shards: int) -> StreamLoop | ShardsLoop:
    """The loop over the results stream of one server, or over those of all shards."""
    return StreamLoop(options) if shards == 1 else ShardsLoop(options, shards=shards)


def follow(
    clients: tuple[redis.Redis, ...], acks: Sequence[redis.Redis], options: StreamOptions
) -> Iterator[StreamItem]:
    """Yield the answers of a loop over the results stream, or over those of all shards.

    Args:
        clients: read entries, and do not retry by themselves; one for each shard.
        acks: the clients with which items acknowledge.
    """
    loop = make_loop(options, shards=len(clients))
    try:
        while (entry := run(clients, loop.next_steps())) is not None:
            client = acks[shard_of_entry(entry.id)]
            yield StreamItem(entry.id, entry.result, client, options.group, entry.generation)
    finally:
        run(clients, loop.leave_steps())


def follow_shard(
    client: redis.Redis, acks: redis.Redis, options: StreamOptions, *, shard: int | None
) -> Iterator[StreamItem]:
    """As `follow`, over the stream of one server or of one shard alone; ids of its entries name no shard.

    Args:
        shard: the index of the shard, for what is logged; None on one server.
    """
    loop = StreamLoop(options, shard=shard)
    try:
        while (entry := run(client, loop.next_steps())) is not None:
            yield StreamItem(entry.id, entry.result, acks, options.group, entry.generation)
    finally:
        run(client, loop.leave_steps())


class ShardsLoop:
    """As `StreamLoop`, over the streams of all shards; ids of its entries begin with the index of the shard.

    It reads the shards in turn, one portion from each, and asks for new entries without blocking the server. A shard
    that is unavailable is skipped; a loop that stops when idle does not end before each shard has answered.
    """

    def __init__(self, options: StreamOptions, *, shards: int) -> None:
        self._streams = [_ShardStream(shard, options) for shard in range(shards)]
        self._turns = deque(self._streams)
        self._idle = Backoff(first_s=FIRST_IDLE_S, max_s=min(max(options.block_s, FIRST_IDLE_S), MAX_IDLE_S))
        self._dry = 0
        """Shards in a row that had nothing to read."""

    def next_steps(self) -> Steps[Entry | None]:
        """The next entry of a shard; None at the end of a loop that stops when idle."""
        while True:
            stream = self._turns[0]
            if (entry := (yield from stream.next_steps())) is not None:
                self._dry = 0
                self._idle.reset()
                return entry
            self._turns.rotate(-1)
            if all(each.is_at_end for each in self._streams):
                return None
            self._dry += 1
            if self._dry >= len(self._streams):
                self._dry = 0
                yield Pause(self._idle.next_s())

    def leave_steps(self) -> Steps[None]:
        """Give up what the loop did not get, in the shards that are available."""
        yield from on_shards({stream.shard: stream.leave_steps() for stream in self._streams if not stream.is_away})


class _ShardStream:
    """The results stream of one shard."""

    def __init__(self, shard: int, options: StreamOptions) -> None:
        self.shard = shard
        self._reader = StreamReader(for_shard(options, shard))
        self._outage = Outage(away_s=options.away_s, shard=shard, max_pause_s=MAX_AWAY_S)
        self._portion: list[Entry] = []
        self._due_s = 0.0

    @property
    def is_at_end(self) -> bool:
        """Whether a loop that stops when idle has all entries of this shard."""
        return self._reader.is_at_end

    @property
    def is_away(self) -> bool:
        """Whether the shard has not answered since its last error."""
        return self._outage.is_on

    def next_steps(self) -> Steps[Entry | None]:
        """The next entry; None where there is none now, or the shard is unavailable."""
        if self.is_at_end or time.monotonic() < self._due_s:
            return None
        try:
            self._portion = yield from on_shard(self.shard, self._portion_steps())
        except (redis.RedisError, OSError) as error:
            pause = self._reader.failed(error) or self._outage.pause(error)
            self._due_s = time.monotonic() + pause.seconds
            return None
        self._outage.end()
        if not self._portion:
            return None
        entry = self._portion.pop(0)
        self._reader.handed_out(entry)
        return replace(entry, id=in_shard(self.shard, entry.id))

    def leave_steps(self) -> Steps[None]:
        """Give up the entries that the loop did not get."""
        yield from self._reader.leave_steps(self._portion)

    def _portion_steps(self) -> Steps[list[Entry]]:
        """The portion that the loop has not got yet, or the next one: of a crashed consumer, otherwise a new one."""
        portion = self._portion or (yield from self._reader.read_steps(block_s=0.0))
        if not portion and not self.is_at_end:
            portion = yield from self._reader.read_steps(block_s=0.0)
        return (yield from self._reader.hold_steps(portion))
