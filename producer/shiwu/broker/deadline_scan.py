"""Looks through quarantine and lanes, a portion at a time, for messages whose own deadline has passed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import tzinfo
from typing import Any, Final

import redis

from shiwu.broker.message_reader import Envelope, read_message
from shiwu.contract import QUARANTINE, Lane, RequestError

PORTION: Final = 100
"""Messages of one read."""
MAX_SEARCHED: Final = 20
"""Portions that are read to find the place of the last step again."""
_LISTS: Final = (QUARANTINE, *(key for lane in Lane for key in lane.keys))


class DeadlineScan:
    """One pass over all lists, in steps of a bounded number of messages. Not thread-safe; may raise redis.RedisError.

    Messages are read from the head. Workers take messages from there meanwhile, so each step looks for the last message
    of the step before, and begins behind it.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._begun_ms = 0.0
        self._list = self._offset = 0
        self._last = b""
        self.finished_ms = 0.0
        """When the last pass that is finished began, by Redis' clock; 0 before the first one."""

    def step(self, *, now_ms: float, limit: int, zone: tzinfo) -> list[Envelope]:
        """Read up to `limit` messages; return those whose deadline has passed. Begins a new pass after the end.

        Args:
            zone: time zone of an `expires` without one.
        """
        if not self._begun_ms:
            self._begun_ms = now_ms
        late: list[Envelope] = []
        while limit > 0 and self._list < len(_LISTS):
            size = min(limit, PORTION)
            records = self._read(size)
            limit -= max(1, len(records))
            late += late_messages(_LISTS[self._list], records, now_ms=now_ms, zone=zone)
            if len(records) < size:
                self._list, self._offset, self._last = self._list + 1, 0, b""
        if self._list == len(_LISTS):
            self.finished_ms, self._begun_ms, self._list = self._begun_ms, 0.0, 0
        return late

    def _read(self, size: int) -> list[bytes]:
        key = _LISTS[self._list]
        offset = self._place(key)
        records: Any = self._client.lrange(key, -(offset + size), -(offset + 1))
        self._offset = offset + len(records)
        if records:
            self._last = records[0]
        read: list[bytes] = records
        return read

    def _place(self, key: str) -> int:
        """How many messages of the list were read, as it is now; 0 where the last one of them is gone."""
        if self._offset == 0 or self._client.lindex(key, -self._offset) == self._last:
            return self._offset
        upper = self._offset + PORTION
        for _ in range(MAX_SEARCHED):
            lower = max(0, upper - PORTION)
            block: Any = self._client.lrange(key, -upper, -(lower + 1))
            if self._last in block:
                return lower + len(block) - int(block.index(self._last))
            upper = lower
            if not upper:
                break
        return 0


def late_messages(key: str, records: Iterable[bytes], *, now_ms: float, zone: tzinfo) -> Iterator[Envelope]:
    """Those of these records of a lane or of the quarantine whose deadline has passed."""
    for record in records:
        try:
            envelope = read_message(record.partition(b"|")[2] if key == QUARANTINE else record, zone=zone)
        except RequestError:
            continue  # a worker answers it with this error
        if envelope.expires_ms is not None and envelope.expires_ms <= now_ms:
            yield envelope
