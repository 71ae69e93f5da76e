"""Stores the vectors of answers in parts, each once, whatever crashes.

A part has the id of its newest stream entry in its name, and entries come in the order of their ids. So what a crashed
sink has stored is known from the names of the parts: entries up to the newest name are acknowledged and not stored
again. A part appears under its name when it is complete, and only then its entries are acknowledged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, Final, TypeAlias

import redis
from redis.exceptions import NoPermissionError

from shiwu.broker.steps import run
from shiwu.client.arguments import MAX_TIME_S
from shiwu.client.stream import StreamOptions, StreamReader
from shiwu.client.stream_items import Entry, EntryReader, Outage, ack_steps, log
from shiwu.contract import RESULT_STREAM, printable
from shiwu.parts import Target, TargetError
from shiwu.vectors.part_writer import NUMBER_BYTES, VectorPartWriter, vector_bytes

CONSUMER: Final = "sink"
"""Always the same, so that a sink gets what the one before it did not acknowledge."""
TEMPORARY: Final = ".vectors-"
READ: Final = 1000
"""Entries that are read in one round trip."""
BLOCK_S: Final = 1.0
AWAY_S: Final = 60.0
"""How long Redis may be away while a part is acknowledged; after that its entries come again, and are dropped."""
OTHER_SINK_IDLE_S: Final = 3.0
"""A sink that runs has asked for entries within this time, except while it stores a part."""
OTHER_SINK_WAIT_S: Final = 10.0
_PART: Final = re.compile(r"vectors-(\d+)-(\d+)\.parquet")
EntryId: TypeAlias = tuple[int, int]


class VectorSink:
    """Reads the results stream as the only consumer of a group. Used by one thread.

    Args:
        client: reads entries; it must not retry by itself.
        acks: acknowledges entries.
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
        client: redis.Redis,
        acks: redis.Redis,
        target: Target,
        group: str,
        part_rows: int,
        part_age_s: float,
        on_part: Callable[[str, int], None] = lambda _name, _rows: None,
        is_stopping_when_idle: bool = False,
    ) -> None:
        self._client = client
        self._acks = acks
        self._target = target
        self._group = group
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
        self._reader = StreamReader(EntryReader(group=group, on_unreadable=self._unreadable), options)
        self._outage = Outage(away_s=None)
        self._writer: VectorPartWriter | None = None
        self._entries: list[str] = []
        """Those of the part that is being written."""
        self._began_s = 0.0
        self.stored = 0
        self.damaged = 0
        """Vectors that were not stored, because they cannot be read."""
        found = target.names()
        self._last: EntryId = max((each for name in found if (each := _entry_of_part(name))), default=(0, 0))
        """The newest entry that is stored, or in the part that is being written."""
        self._published = self._last
        for name in found:
            if name.startswith(TEMPORARY):
                target.delete(name)

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left to read, for a sink that stops when idle."""
        return self._reader.is_at_end

    def step(self, *, block_s: float = BLOCK_S) -> None:
        """Read a portion, and complete the part if it is time.

        Raises:
            TargetError: the part cannot be written; its entries come again after the next start.
        """
        try:
            entries = run(self._client, self._reader.read_steps(block_s=block_s))
        except (redis.RedisError, OSError) as error:
            pause = self._reader.failed(error) or self._outage.pause(error)
            Event().wait(pause.seconds)
            return
        self._outage.end()
        self._acknowledge([entry.id for entry in entries if not self._take(entry)])
        if self._entries and time.monotonic() - self._began_s >= self._part_age_s:
            self.record()

    def _take(self, entry: Entry) -> bool:
        """Add the vector of an entry to the part; False where it needs no part, so that it can be acknowledged."""
        entry_id = _entry_id(entry.id)
        if entry_id <= self._last:
            # Stored before, or in the part already: the group was deleted, or a reply was lost.
            return entry_id > self._published
        try:
            vector = vector_bytes(entry.result)
        except ValueError as error:
            self.damaged += 1
            log.warning("the vector of %s is not stored: %s", printable(entry.result.id), error)
            return False
        if vector is None:
            return False
        width = len(vector) // NUMBER_BYTES
        if self._writer is not None and self._writer.width != width:
            self.record()
        if self._writer is None:
            self._writer = VectorPartWriter(self._target.local("part"), width=width)
            self._began_s = time.monotonic()
        self._writer.add(entry.result, vector)
        self._entries.append(entry.id)
        self._last = entry_id
        if self._writer.rows >= self._part_rows:
            self.record()
        return True

    def record(self) -> None:
        """Complete the part, give it its name, and acknowledge its entries. Without vectors it does nothing.

        Raises:
            TargetError: the part cannot be written; its entries come again after the next start.
        """
        writer, entries = self._writer, self._entries
        if writer is None:
            return
        writer.close()
        name = f"vectors-{self._last[0]:013}-{self._last[1]:06}.parquet"  # in the order of time
        self._target.publish(self._target.stage("part", token=name), name)
        self._published = self._last
        self._writer, self._entries = None, []
        self.stored += writer.rows
        self._on_part(name, writer.rows)
        self._acknowledge(entries)

    def _acknowledge(self, entry_ids: Sequence[str]) -> None:
        try:
            run(self._acks, ack_steps(entry_ids, group=self._group, away_s=AWAY_S))
        except redis.RedisError as error:
            # They come again, and are known by their ids then.
            log.warning("%d entries are not acknowledged: %s", len(entry_ids), printable(str(error)))

    def _unreadable(self, entry_id: str, _: Mapping[bytes, bytes], reason: str) -> None:
        log.warning("entry %s of %s was skipped and stays pending: %s", entry_id, RESULT_STREAM, printable(reason))


def check_alone(client: redis.Redis, group: str) -> None:
    """Wait until no other sink reads this group; two would store some vectors twice.

    Raises:
        TargetError: another one goes on reading.
    """
    until_s = time.monotonic() + OTHER_SINK_WAIT_S
    while _idle_s(client, group) < OTHER_SINK_IDLE_S:
        if time.monotonic() > until_s:
            raise TargetError(f"expected no other sink of the group {group}, and one reads it now; use another --group")
        Event().wait(0.2)


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
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number)


def _entry_of_part(name: str) -> EntryId | None:
    found = _PART.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None
