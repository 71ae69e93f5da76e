"""Reads the results streams of all shards in portions, as the only consumer of a group.

The caller keeps entries for long, such as until a file is complete, and acknowledges them then. A shard that is
unavailable is skipped, so that it holds up no other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import Final

import redis

from shiwu.broker.backoff import MAX_PAUSE_S
from shiwu.broker.steps import run
from shiwu.client.shard_stream import MAX_AWAY_S
from shiwu.client.stream import StreamOptions, StreamReader, for_shard
from shiwu.client.stream_items import Entry, Outage, ack_steps, in_shard, shard_of_entry
from shiwu.contract import RESULT_STREAM

MIN_BATCH: Final = 100
"""Entries that are read from one shard at least in one round trip."""
AGAIN_S: Final = 60.0
"""What was acknowledged so short before an outage is acknowledged again, because a failover may have lost it."""


class SoleConsumer:
    """The consumer, over one server or over shards. Used by one thread.

    Over shards the ids of entries begin with the index of the shard, also those that `on_unreadable` gets.

    Args:
        clients: read entries, and do not retry by themselves; one for each shard.
        acks: acknowledge entries; one for each shard.
        options: `batch` is that of all shards together.
    """

    def __init__(self, clients: Sequence[redis.Redis], acks: Sequence[redis.Redis], options: StreamOptions) -> None:
        self._acks = tuple(acks)
        self._group = options.group
        if len(clients) > 1:
            options = replace(options, batch=max(MIN_BATCH, options.batch // len(clients)))
        self._streams = [
            _Stream(client, ack, options, shard=shard if len(clients) > 1 else None)
            for shard, (client, ack) in enumerate(zip(clients, acks, strict=True))
        ]

    @property
    def has_groups(self) -> bool:
        """Whether the group was in all shards at the last read; otherwise the next read creates it."""
        return all(stream.has_group for stream in self._streams)

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left to read, for a consumer that stops when idle."""
        return all(stream.is_at_end for stream in self._streams)

    def is_away(self, shard: int) -> bool:
        """Whether a shard has not answered since its last error."""
        return self._streams[shard].is_away

    def read(self, *, block_s: float) -> list[Entry]:
        """The next entries of all shards; where there are none, it waits for up to `block_s`.

        Raises:
            redis.RedisError: an error that time cannot cure.
        """
        if len(self._streams) == 1 and not self._streams[0].is_paused:
            return self._streams[0].read(block_s=block_s)
        found = [entry for stream in self._streams for entry in stream.read(block_s=0.0)]
        if not found and block_s and not self.is_at_end:
            Event().wait(block_s)
        return found

    def acknowledge(self, entry_ids: Sequence[str]) -> None:
        """Acknowledge entries: now, or once their shard is available again while this consumer reads.

        Raises:
            redis.RedisError: an error that time cannot cure.
        """
        for entry_id in entry_ids:
            self._streams[shard_of_entry(entry_id)].done.append(entry_id)
        for stream in self._streams:
            stream.acknowledge()

    def make_group(self) -> None:
        """Create the group in each shard, for the answers after now, unless it is there.

        Raises:
            redis.RedisError: a shard is unavailable; repeating the call is safe.
        """
        for client in self._acks:
            try:
                client.xgroup_create(RESULT_STREAM, self._group, id="$", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        for stream in self._streams:
            stream.group_was_made()

    def drop_group(self) -> None:
        """Delete the group in each shard, so that no stream is kept for it.

        Raises:
            redis.RedisError: a shard is unavailable; repeating the call is safe.
        """
        for client in self._acks:
            client.xgroup_destroy(RESULT_STREAM, self._group)


class _Stream:
    """The results stream of one shard, or of one server."""

    def __init__(self, client: redis.Redis, acks: redis.Redis, options: StreamOptions, *, shard: int | None) -> None:
        self._client = client
        self._acks = acks
        self._group = options.group
        self._shard = shard
        self._reader = StreamReader(options if shard is None else for_shard(options, shard))
        longest_s = MAX_PAUSE_S if shard is None else MAX_AWAY_S
        self._outage = Outage(away_s=options.away_s, shard=shard, max_pause_s=longest_s)
        self._due_s = 0.0
        self.done: list[str] = []
        """Entries that are to be acknowledged."""
        self._acknowledged: deque[tuple[float, list[str]]] = deque()
        """Those of the last minute, with their times."""

    @property
    def has_group(self) -> bool:
        return self._reader.has_group

    def group_was_made(self) -> None:
        """Note that the group is there."""
        self._reader.group_was_made()

    @property
    def is_at_end(self) -> bool:
        return self._reader.is_at_end and not self._outage.is_on

    @property
    def is_away(self) -> bool:
        return self._outage.is_on

    @property
    def is_paused(self) -> bool:
        """Whether a pause after an error is not over yet."""
        return time.monotonic() < self._due_s

    def read(self, *, block_s: float) -> list[Entry]:
        """The next entries; none where the shard is unavailable."""
        if self.is_paused or self.is_at_end:
            return []
        try:
            self._acknowledge()
            entries = run(self._client, self._reader.read_steps(block_s=block_s))
            if not entries and self._shard is not None:
                # Every other read looks for entries of crashed consumers only.
                entries = run(self._client, self._reader.read_steps(block_s=0.0))
        except (redis.RedisError, OSError) as error:
            self._pause(error)
            return []
        self._outage.end()
        if self._shard is None:
            return entries
        return [replace(entry, id=in_shard(self._shard, entry.id)) for entry in entries]

    def acknowledge(self) -> None:
        """Acknowledge what is done, unless the shard is unavailable."""
        if self.is_away:
            return
        try:
            self._acknowledge()
        except (redis.RedisError, OSError) as error:
            self._pause(error)

    def _acknowledge(self) -> None:
        if self.done:
            run(self._acks, ack_steps(self.done, group=self._group))
            now_s = time.monotonic()
            self._acknowledged.append((now_s, self.done))
            self.done = []
            while now_s - self._acknowledged[0][0] > AGAIN_S:
                self._acknowledged.popleft()

    def _pause(self, error: redis.RedisError | OSError) -> None:
        pause = self._reader.failed(error) or self._outage.pause(error)
        now_s = time.monotonic()
        self._due_s = now_s + pause.seconds
        self.done += [entry_id for at_s, ids in self._acknowledged if now_s - at_s <= AGAIN_S for entry_id in ids]
        self._acknowledged.clear()
