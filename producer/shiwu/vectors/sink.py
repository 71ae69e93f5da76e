"""Stores the vectors of answers in parts, each once, whatever crashes.

A part has the id of its newest stream entry in its name, and entries come in the order of their ids. So what a crashed
sink has stored is known from the names of the parts: entries up to the newest name are acknowledged and not stored
again. A part appears under its name when it is complete, and only then its entries are acknowledged.

Over shards each has parts of its own, because the order of entries holds within a shard.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Final, TypeAlias

import redis
from redis.exceptions import NoPermissionError

from shiwu.broker.sharding import keep_shard_count
from shiwu.client.arguments import MAX_TIME_S
from shiwu.client.sole_consumer import SoleConsumer
from shiwu.client.stream import StreamOptions
from shiwu.client.stream_items import Entry, Outage, log, shard_of_entry
from shiwu.contract import RESULT_STREAM, printable
from shiwu.parts import Target, TargetError
from shiwu.vectors.part_writer import NUMBER_BYTES, VectorPartWriter, vector_bytes

CONSUMER: Final = "sink"
"""Always the same, so that a sink gets what the one before it did not acknowledge."""
TEMPORARY: Final = ".vectors-"
READ: Final = 1000
"""Entries that are read in one round trip."""
BLOCK_S: Final = 1.0
OTHER_SINK_IDLE_S: Final = 3.0
"""A sink that runs has asked for entries within this time, except while it stores a part."""
OTHER_SINK_WAIT_S: Final = 10.0
START_AWAY_S: Final = 60.0
"""How long a start waits for Redis. A wrong address ends it then; a sink that runs waits without a limit."""
_PART: Final = re.compile(r"vectors-(?:(\d{3})-)?(\d{13,})-(\d{6,})\.parquet")
EntryId: TypeAlias = tuple[int, int]


@dataclass(slots=True)
class _Part:
    """The part of one shard that is being written, and what is stored of this shard."""

    prefix: str
    """The shard in the names of its parts; empty on one server."""
    last: EntryId
    """The newest entry that is stored, or in the part that is being written."""
    published: EntryId
    """The newest entry that is stored."""
    writer: VectorPartWriter | None = None
    entries: list[str] = field(default_factory=list)
    """Those of the part that is being written."""
    began_s: float = 0.0

    @property
    def local_name(self) -> str:
        return f"{self.prefix}part"

    @property
    def name(self) -> str:
        """In the order of time."""
        return f"vectors-{self.prefix}{self.last[0]:013}-{self.last[1]:06}.parquet"


class VectorSink:
    """Reads the results streams of all shards as the only consumer of a group. Used by one thread.

    Args:
        clients: read entries; they do not retry by themselves. One for each shard.
        acks: acknowledge entries; one for each shard.
        part_rows: vectors of one part.
        part_age_s: a part is completed after this time, with fewer vectors.
        on_part: called with the name of each new part and the number of its vectors.
        is_stopping_when_idle: the sink is at its end once all answers are stored.

    Raises:
        TargetError: the parts cannot be listed.
    """

    def __init__(
        self,
        *,
        clients: Sequence[redis.Redis],
        acks: Sequence[redis.Redis],
        target: Target,
        group: str,
        part_rows: int,
        part_age_s: float,
        on_part: Callable[[str, int], None] = lambda _name, _rows: None,
        is_stopping_when_idle: bool = False,
    ) -> None:
        self._target = target
        self._part_rows = part_rows
        self._part_age_s = part_age_s
        self._on_part = on_part
        options = StreamOptions(
            group=group,
            consumer=CONSUMER,
            is_temporary=False,
            batch=READ,
            block_s=BLOCK_S,
            # The only consumer: nothing of it may go to another one.
            reclaim_idle_s=MAX_TIME_S,
            stop_when_idle=is_stopping_when_idle,
            away_s=None,
            on_unreadable=self._unreadable,
        )
        self._consumer = SoleConsumer(clients, acks, options)
        self.stored = 0
        self.damaged = 0
        """Vectors that were not stored, because they cannot be read."""
        found = target.names()
        self._parts = [_open_part(found, shard if len(clients) > 1 else None) for shard in range(len(clients))]
        for name in found:
            if name.startswith(TEMPORARY):
                target.delete(name)

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left to read, for a sink that stops when idle."""
        return self._consumer.is_at_end

    def step(self, *, block_s: float = BLOCK_S) -> None:
        """Read a portion of each shard, and complete the parts for which it is time.

        Raises:
            TargetError: a part cannot be written; its entries come again after the next start.
            redis.RedisError: an error that time cannot cure.
        """
        entries = self._consumer.read(block_s=block_s)
        self._consumer.acknowledge([entry.id for entry in entries if not self._take(entry)])
        for part in self._parts:
            if part.entries and time.monotonic() - part.began_s >= self._part_age_s:
                self._record(part)

    def _take(self, entry: Entry) -> bool:
        """Add the vector of an entry to a part; False where it needs no part, so that it can be acknowledged."""
        part = self._parts[shard_of_entry(entry.id)]
        entry_id = _entry_id(entry.id)
        if entry_id <= part.last:
            # Stored before, or in the part already: the group was deleted, or a reply was lost.
            return entry_id > part.published
        try:
            vector = vector_bytes(entry.result)
        except ValueError as error:
            self.damaged += 1
            log.warning("the vector of %s is not stored: %s", printable(entry.result.id), error)
            return False
        if vector is None:
            return False
        width = len(vector) // NUMBER_BYTES
        if part.writer is not None and part.writer.width != width:
            self._record(part)
        if part.writer is None:
            part.writer = VectorPartWriter(self._target.local(part.local_name), width=width)
            part.began_s = time.monotonic()
        part.writer.add(entry.result, vector)
        part.entries.append(entry.id)
        part.last = entry_id
        if part.writer.rows >= self._part_rows:
            self._record(part)
        return True

    def record(self) -> None:
        """Complete all parts, give them their names, and acknowledge their entries. Without vectors it does nothing.

        Raises:
            TargetError: a part cannot be written; its entries come again after the next start.
        """
        for part in self._parts:
            self._record(part)

    def _record(self, part: _Part) -> None:
        writer, entries = part.writer, part.entries
        if writer is None:
            return
        writer.close()
        name = part.name
        self._target.publish(self._target.stage(part.local_name, token=name), name)
        part.published = part.last
        part.writer, part.entries = None, []
        self.stored += writer.rows
        self._on_part(name, writer.rows)
        self._consumer.acknowledge(entries)

    def _unreadable(self, entry_id: str, _: Mapping[bytes, bytes], reason: str) -> None:
        log.warning("entry %s of %s was skipped and stays pending: %s", entry_id, RESULT_STREAM, printable(reason))


def check_start(clients: Sequence[redis.Redis], group: str, *, stop: Event) -> None:
    """Check the number of shards, and that no other sink reads this group. Waits while Redis is unavailable.

    Args:
        stop: ends the wait; then not all is checked.

    Raises:
        TargetError: another sink goes on reading.
        redis.RedisError: Redis, or shard 0, was unavailable for `START_AWAY_S`, or time cannot cure the error.
    """
    has_shards = len(clients) > 1
    # Only shard 0 is asked alone; of the others one is enough.
    outage = Outage(away_s=START_AWAY_S, shard=0 if has_shards else None)
    while not stop.is_set():
        try:
            if has_shards:
                keep_shard_count(clients[0], shards=len(clients))
            check_alone(clients, group)
        except (redis.RedisError, OSError) as error:
            stop.wait(outage.pause(error).seconds)
        else:
            outage.end()
            return


def check_alone(clients: Sequence[redis.Redis], group: str) -> None:
    """Wait until no other sink reads this group; two would store some vectors twice.

    A sink reads all shards, so one that is available shows it.

    Raises:
        TargetError: another one goes on reading.
        redis.RedisError: no shard is available.
    """
    until_s = time.monotonic() + OTHER_SINK_WAIT_S
    while _least_idle_s(clients, group) < OTHER_SINK_IDLE_S:
        if time.monotonic() > until_s:
            raise TargetError(f"expected no other sink of the group {group}, and one reads it now; use another --group")
        Event().wait(0.2)


def _least_idle_s(clients: Sequence[redis.Redis], group: str) -> float:
    """Since when no sink has asked for entries of this group, in any shard that is available."""
    found: list[float] = []
    failure: redis.RedisError | None = None
    for client in clients:
        try:
            found.append(_idle_s(client, group))
        except redis.RedisError as error:
            failure = error
    if failure is not None and not found:
        raise failure
    return min(found)


def _idle_s(client: redis.Redis, group: str) -> float:
    """Since when no sink has asked for entries of this group."""
    try:
        consumers: Any = client.xinfo_consumers(RESULT_STREAM, group)
    except NoPermissionError:
        return MAX_TIME_S
    except redis.ResponseError as error:
        if "NOGROUP" in str(error) or "no such key" in str(error):
            return MAX_TIME_S
        raise
    idle = [float(one["idle"]) / 1000 for one in consumers if one["name"] == CONSUMER.encode()]
    return min(idle, default=MAX_TIME_S)


def _entry_id(text: str) -> EntryId:
    milliseconds, _, number = text.rpartition("/")[2].partition("-")
    return int(milliseconds), int(number)


def _open_part(names: Iterable[str], shard: int | None) -> _Part:
    """The part of a shard, which goes on after the newest of its parts; None stands for one server."""
    matches = (_PART.fullmatch(name) for name in names)
    prefix = "" if shard is None else f"{shard:03}"
    own = (match for match in matches if match is not None and (match[1] or "") == prefix)
    last = max(((int(match[2]), int(match[3])) for match in own), default=(0, 0))
    return _Part(prefix=prefix and f"{prefix}-", last=last, published=last)
