"""The items of a loop over the results stream, and its pauses while Redis is unavailable."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import redis

from shiwu.broker.backoff import MAX_PAUSE_S, Backoff
from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import RedisCode, classify, explain, info_of
from shiwu.broker.script_loader import call_script
from shiwu.broker.steps import Pause, Steps, run
from shiwu.client.results import TagResult
from shiwu.contract import RESULT_STREAM, printable

MAX_REPORTED: Final = 10_000
"""How many unreadable entries are remembered, so that each is reported once."""
ACK_CHUNK_SIZE: Final = 500
GIVEN_UP_MS: Final = 10 * 86_400_000
"""Idle time set on an entry that its consumer gives up, so that the next consumer takes it over immediately."""
log: Final = logging.getLogger("shiwu")


@dataclass(frozen=True)
class StreamItem:
    """One answer of the results stream. It belongs to this consumer until `ack`, or until it is idle for too long."""

    entry_id: str
    """Id of the entry in the stream; over shards after the index of its shard, as in `7/1764500000000-0`."""
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
        run(self._client, ack_steps([self.entry_id], group=self._group, away_s=away_s))


@dataclass(frozen=True)
class UnreadableItem:
    """An entry of the results stream that this version of the client cannot read.

    It stays pending, so that the group gets it again after an upgrade of the client; `ack` gives it up.
    """

    entry_id: str
    """Id of the entry in the stream; over shards after the index of its shard."""
    fields: Mapping[bytes, bytes]
    """The fields of the entry as they are in Redis."""
    reason: str
    """Why it cannot be read."""
    _client: redis.Redis
    _group: str

    def ack(self) -> None:
        """Give the entry up: the group does not get it again."""
        run(self._client, ack_steps([self.entry_id], group=self._group))


def give_up(item: StreamItem) -> None:
    """Let the next consumer of the group take over an answer immediately; does nothing if Redis is unavailable."""
    entry_id = item.entry_id.rpartition("/")[2]
    with suppress(redis.RedisError, OSError):
        for held in item._client.xpending_range(RESULT_STREAM, item._group, min=entry_id, max=entry_id, count=1):
            args = [item._group, held["consumer"], GIVEN_UP_MS, entry_id]
            call_script("hold_entries", keys=[RESULT_STREAM], args=args)(item._client)


class Unreadable(Protocol):
    """An entry that cannot be read, as either client passes it to `on_unreadable`."""

    @property
    def entry_id(self) -> str:
        """Id of the entry in the stream."""

    @property
    def reason(self) -> str:
        """Why it cannot be read."""


def log_unreadable(item: Unreadable) -> None:
    """Write a warning to the logger `shiwu`."""
    log.warning(
        "entry %s of %s was skipped and stays pending: %s", item.entry_id, RESULT_STREAM, printable(item.reason)
    )


def in_shard(shard: int, entry_id: str) -> str:
    """The id of an entry over shards."""
    return f"{shard}/{entry_id}"


def shard_of_entry(entry_id: str) -> int:
    """The index of the shard in the id of an entry; 0 on one server."""
    shard, slash, _ = entry_id.partition("/")
    return int(shard) if slash else 0


def ack_steps(entry_ids: Sequence[str], *, group: str, away_s: float = 0.0) -> Steps[None]:
    """Acknowledge entries of one shard, some hundreds in each command; retry for `away_s` seconds while it is away."""
    outage = Outage(away_s=away_s)
    portions = list(chunks([entry_id.rpartition("/")[2] for entry_id in entry_ids], ACK_CHUNK_SIZE))
    while portions:
        try:
            yield partial(_acknowledge, group=group, entry_ids=portions[0])
        except (redis.RedisError, OSError) as error:
            yield outage.pause(error)
        else:
            outage.end()
            del portions[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the results stream that was read."""

    id: str
    result: TagResult
    generation: int
    """How often the dead letter of the answer's id was requeued before this answer."""


class EntryReader:
    """Reads entries, and reports each unreadable one once.

    Args:
        on_unreadable: gets the id, the fields and the reason.
    """

    def __init__(self, *, group: str, on_unreadable: Callable[[str, Mapping[bytes, bytes], str], None]) -> None:
        self._group = group
        self._on_unreadable = on_unreadable
        self._reported: OrderedDict[bytes, None] = OrderedDict()

    def read_steps(self, raws: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> Steps[list[Entry]]:
        """The readable entries; those that were trimmed while pending are acknowledged."""
        entries = []
        for entry_id, fields in raws:
            if not fields:  # the entry was trimmed while it was pending
                yield partial(_acknowledge, group=self._group, entry_ids=[entry_id])
                continue
            try:
                entries.append(_read_entry(entry_id.decode(), fields))
            except ValueError as error:
                self._report(entry_id, fields, str(error)[:300])
        return entries

    def _report(self, entry_id: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        if entry_id not in self._reported:
            self._on_unreadable(entry_id.decode(), fields, reason)
        self._reported[entry_id] = None
        while len(self._reported) > MAX_REPORTED:
            self._reported.popitem(last=False)


def _acknowledge(client: Any, *, group: str, entry_ids: Sequence[str | bytes]) -> Any:
    return client.xack(RESULT_STREAM, group, *entry_ids)


class Outage:
    """Gives pauses while Redis is unavailable, each longer than the last up to a limit; logs the begin and the end.

    Another reason is logged too, as where a replica has taken over and refuses writes for want of a replica.

    Args:
        away_s: how long it may last before its error is raised; None: forever.
        shard: the shard that is meant; None on one server.
    """

    def __init__(self, *, away_s: float | None, shard: int | None = None, max_pause_s: float = MAX_PAUSE_S) -> None:
        self._away_s = away_s
        self._shard = shard
        self._since_s: float | None = None
        self._reasons: set[RedisCode] = set()
        """Those that were logged since the begin."""
        self._backoff = Backoff(max_s=max_pause_s)

    @property
    def is_on(self) -> bool:
        """Whether Redis has not answered since the last error."""
        return self._since_s is not None

    def pause(self, error: Exception) -> Pause:
        """The pause before the next try.

        Raises:
            redis.RedisError: this error, if a retry cannot help or it has lasted longer than `away_s`.
        """
        now_s = time.monotonic()
        since_s = now_s if self._since_s is None else self._since_s
        if not info_of(error).is_temporary or (self._away_s is not None and now_s - since_s >= self._away_s):
            raise error
        if (reason := classify(error)) not in self._reasons:
            self._reasons.add(reason)
            text = explain(error)
            log.warning("%s; trying again", text if self._shard is None else f"shard {self._shard}: {text}")
        self._since_s = since_s
        return Pause(self._backoff.next_s())

    def end(self) -> None:
        """Record that Redis has answered."""
        if self._since_s is not None and self._shard is None:
            log.warning("Redis answers again, after %.1f s", time.monotonic() - self._since_s)
        elif self._since_s is not None:
            log.warning("shard %d answers again, after %.1f s", self._shard, time.monotonic() - self._since_s)
        self._since_s = None
        self._reasons.clear()
        self._backoff.reset()


def _read_entry(entry_id: str, fields: Mapping[bytes, bytes]) -> Entry:
    """Read an entry of the stream.

    Raises:
        ValueError: it has no answer, or one that this version cannot read.
    """
    if (raw := fields.get(b"answer")) is None:
        raise ValueError("expected a field `answer`, got none")
    generation = fields.get(b"generation", b"0")
    return Entry(entry_id, TagResult.from_json(raw), int(generation) if generation.isdigit() else 0)
