"""The items of a loop over the results stream, and its pauses while Redis is unavailable."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Event
from typing import Final

import redis

from shiwu.broker.backoff import Backoff
from shiwu.broker.redis_errors import explain, info_of
from shiwu.client.results import TagResult
from shiwu.contract import RESULT_STREAM, printable

MAX_REPORTED: Final = 10_000
"""How many unreadable entries are remembered, so that each is reported once."""
log: Final = logging.getLogger("shiwu")


@dataclass(frozen=True)
class StreamItem:
    """One answer of the results stream. It belongs to this consumer until `ack`, or until it is idle for too long."""

    entry_id: str
    """Id of the entry in the stream."""
    result: TagResult
    """The answer, whatever its status."""
    _client: redis.Redis
    _group: str
    generation: int = 0
    """How often the dead letter of this id was requeued before this answer."""

    def ack(self, *, away_s: float = 0.0) -> None:
        """Acknowledge the answer: the group does not get it again. May be called from any thread.

        Args:
            away_s: how long to retry while Redis is unavailable, in seconds.

        Raises:
            redis.RedisError: the answer is not acknowledged, and will be delivered again.
        """
        outage = Outage(away_s=away_s)
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

    It stays pending, so that the group gets it again after an upgrade of the client; `ack` gives it up.
    """

    entry_id: str
    """Id of the entry in the stream."""
    fields: Mapping[bytes, bytes]
    """The fields of the entry as they are in Redis."""
    reason: str
    """Why it cannot be read."""
    _client: redis.Redis
    _group: str

    def ack(self) -> None:
        """Give the entry up: the group does not get it again."""
        self._client.xack(RESULT_STREAM, self._group, self.entry_id)


def log_unreadable(item: UnreadableItem) -> None:
    """Write a warning to the logger `shiwu`."""
    log.warning(
        "entry %s of %s was skipped and stays pending: %s", item.entry_id, RESULT_STREAM, printable(item.reason)
    )


class EntryReader:
    """Converts entries to items, and reports each unreadable entry once."""

    def __init__(self, client: redis.Redis, *, group: str, on_unreadable: Callable[[UnreadableItem], None]) -> None:
        self._client = client
        self._group = group
        self._on_unreadable = on_unreadable
        self._reported: OrderedDict[bytes, None] = OrderedDict()

    def read(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[StreamItem]:
        """The readable entries as items; entries that were trimmed while pending are acknowledged."""
        items = []
        for entry_id, fields in entries:
            if not fields:  # the entry was trimmed while it was pending
                self._client.xack(RESULT_STREAM, self._group, entry_id)
                continue
            try:
                items.append(self._item(entry_id.decode(), fields))
            except ValueError as error:
                self._report(entry_id, fields, str(error)[:300])
        return items

    def _item(self, entry_id: str, fields: Mapping[bytes, bytes]) -> StreamItem:
        generation = fields.get(b"generation", b"0")
        number = int(generation) if generation.isdigit() else 0
        return StreamItem(entry_id, _read_entry(fields), self._client, self._group, number)

    def _report(self, entry_id: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        if entry_id not in self._reported:
            self._on_unreadable(UnreadableItem(entry_id.decode(), fields, reason, self._client, self._group))
        self._reported[entry_id] = None
        while len(self._reported) > MAX_REPORTED:
            self._reported.popitem(last=False)


class Outage:
    """Pauses while Redis is unavailable, each longer than the last up to a limit; logs the begin and the end."""

    def __init__(self, *, away_s: float | None) -> None:
        self._away_s = away_s
        self._since_s: float | None = None
        self._backoff = Backoff()

    @property
    def is_on(self) -> bool:
        """Whether Redis has not answered since the last error."""
        return self._since_s is not None

    def wait(self, error: Exception) -> None:
        """Pause before the next try.

        Raises:
            redis.RedisError: this error, if a retry cannot help or it has lasted longer than `away_s`.
        """
        now_s = time.monotonic()
        since_s = now_s if self._since_s is None else self._since_s
        if not info_of(error).is_temporary or (self._away_s is not None and now_s - since_s >= self._away_s):
            raise error
        if self._since_s is None:
            log.warning("%s; trying again", explain(error))
        self._since_s = since_s
        Event().wait(self._backoff.next_s())

    def end(self) -> None:
        """Record that Redis has answered."""
        if self._since_s is not None:
            log.warning("Redis answers again, after %.1f s", time.monotonic() - self._since_s)
        self._since_s = None
        self._backoff.reset()


def _read_entry(fields: Mapping[bytes, bytes]) -> TagResult:
    """Read the answer of a stream entry.

    Raises:
        ValueError: it has no answer, or one that this version cannot read.
    """
    if (raw := fields.get(b"answer")) is None:
        raise ValueError("expected a field `answer`, got none")
    return TagResult.from_json(raw)
