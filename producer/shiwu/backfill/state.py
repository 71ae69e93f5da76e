"""The state of a backfill in Redis. One process owns it; another one that starts takes it over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Final, Self, TypeVar

import msgspec
import redis

from shiwu.backfill.entries import KeptRecord
from shiwu.backfill.errors import StateLost, TakenOver, UnusableState
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.totals import Totals
from shiwu.broker.chunks import chunks
from shiwu.broker.script_loader import load_script
from shiwu.client.stream_items import Outage
from shiwu.contract import BACKFILL, BACKFILL_OPEN, BACKFILLS

T = TypeVar("T")
KEPT_S: Final = 30 * 86_400
"""How long the state is kept after the end."""
SCAN_COUNT: Final = 1000
ALIVE_MS: Final = 10_000.0
"""A process that has not written for so long does not run."""
PART: Final = "part:"


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of results. While `temp` is set, it may still have this temporary name."""

    name: str
    rows: int
    bytes: int
    sha256: str
    temp: str = ""

    def named(self) -> Part:
        """The same part once it has its own name."""
        return msgspec.structs.replace(self, temp="")

    def to_text(self) -> str:
        """As it is kept in Redis."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True, slots=True)
class Saved:
    """The state as it was read."""

    plan: Plan
    pace: Pace
    phase: str
    """`running`, `finished`, `cancelled` or `stopped` (too many failures)."""
    wanted: str
    """What an operator wants: `pause`, `cancel` or empty."""
    owner: str
    cursor: str
    portion: int
    """Number of the last portion whose jobs are registered."""
    sent_portion: int
    """Number of the last portion that was sent."""
    is_source_done: bool
    counts: Mapping[str, int]
    """read, left_out, repeated, sent, resent."""
    parts: Mapping[int, Part]
    totals: Totals
    heartbeat_ms: float
    started_ms: float
    ended_ms: float | None
    passes: int
    live: Mapping[str, Any]
    """What the running process shows, up to a second old."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Self:
        """Read the fields of the hash.

        Raises:
            ValueError: they are of something else, or of a version that this one cannot read.
        """
        parts = {
            int(name.removeprefix(PART)): msgspec.json.decode(text, type=Part)
            for name, text in fields.items()
            if name.startswith(PART)
        }
        return cls(
            plan=msgspec.json.decode(fields["plan"], type=Plan),
            pace=msgspec.json.decode(fields["pace"], type=Pace),
            phase=fields["phase"],
            wanted=fields.get("wanted", ""),
            owner=fields.get("owner", ""),
            cursor=fields.get("cursor", ""),
            portion=int(fields.get("portion", 0)),
            sent_portion=int(fields.get("sent_portion", 0)),
            is_source_done=fields.get("source_done") == "1",
            counts={name: int(fields.get(name, 0)) for name in COUNTS},
            parts=dict(sorted(parts.items())),
            totals=Totals.from_fields(fields),
            heartbeat_ms=float(fields.get("heartbeat_ms", 0)),
            started_ms=float(fields["started_ms"]),
            ended_ms=float(fields["ended_ms"]) if "ended_ms" in fields else None,
            passes=int(fields.get("passes", 1)),
            live=msgspec.json.decode(fields.get("live", "{}"), type=dict[str, Any]),
        )

    def is_run(self, *, now_ms: float) -> bool:
        """Whether a process runs it now."""
        return bool(self.owner) and now_ms - self.heartbeat_ms < ALIVE_MS


COUNTS: Final = ("read", "left_out", "repeated", "sent", "resent")


@dataclass(slots=True)
class Change:
    """What one write changes."""

    fields: dict[str, str] = field(default_factory=dict)
    increments: dict[str, int] = field(default_factory=dict)
    opened: Sequence[tuple[str, bytes]] = ()
    """(id, record) of jobs that are registered."""
    closed: Sequence[str] = ()
    """Ids of jobs whose answers are written."""

    def add(self, other: Change) -> None:
        """Take over fields and increments of another change."""
        self.fields = {**other.fields, **self.fields}
        for name, number in other.increments.items():
            self.increments[name] = self.increments.get(name, 0) + number


class BackfillState:
    """Reads and writes the state of one backfill. Used by one thread.

    Args:
        is_stopping: whether writes should give up while Redis is unavailable, instead of waiting.
    """

    def __init__(self, client: redis.Redis, name: str, *, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._redis = client
        self.name = name
        self._key = f"{BACKFILL}{name}"
        self._open_key = f"{BACKFILL_OPEN}{name}"
        self._script = load_script(client, "write", package="shiwu.backfill")
        self._is_stopping = is_stopping
        self._token = ""
        self._take = 0
        self._number = 0
        self._noted = Change()

    def read(self) -> Saved | None:
        """The state, or None where there is no such backfill.

        Raises:
            UnusableState: this version cannot read it.
        """
        raw: Any = self._redis.hgetall(self._key)
        if not raw:
            return None
        try:
            return Saved.from_fields({name.decode(): text.decode() for name, text in raw.items()})
        except (ValueError, KeyError) as error:
            raise UnusableState(f"{self.name}: expected the state of a backfill under {self._key} ({error})") from None

    def create(self, plan: Plan, pace: Pace, *, now_ms: float) -> None:
        """Write the state of a new backfill, unless there is one."""
        fields = {"phase": "running", "started_ms": repr(now_ms), "passes": "1"}
        fields |= {"pace": _text(pace), "plan": _text(plan), "digest": plan.digest}
        with self._redis.pipeline() as pipe:
            pipe.zadd(BACKFILLS, {self.name: now_ms}, nx=True)
            for name, text in fields.items():
                pipe.hsetnx(self._key, name, text)
            pipe.execute()

    def take(self, token: str, *, now_ms: float) -> None:
        """Become the owner; from now on writes of an earlier owner are refused."""
        self._token, self._number, self._noted = token, 0, Change()
        with self._redis.pipeline() as pipe:
            pipe.hincrby(self._key, "takes", 1)
            pipe.hset(self._key, mapping={"owner": token, "seq": "0", "heartbeat_ms": repr(now_ms)})
            pipe.persist(self._key)
            self._take = int(pipe.execute()[0])

    def reopen(self, pace: Pace, *, is_new_pass: bool) -> None:
        """Let an ended backfill go on, from the beginning of its source where this is a new pass; set its pace."""
        fields: dict[Any, Any] = {"phase": "running", "pace": _text(pace)}
        if is_new_pass:
            fields |= {"cursor": "", "source_done": "0", "wanted": ""}
        with self._redis.pipeline() as pipe:
            pipe.hset(self._key, mapping=fields)
            pipe.hdel(self._key, "ended_ms")
            if is_new_pass:
                pipe.hincrby(self._key, "passes", 1)
            pipe.execute()

    def want(self, what: str) -> None:
        """Tell the process that runs it to pause, to cancel, or (with an empty text) to go on."""
        self._redis.hset(self._key, "wanted", what)

    def note(self, change: Change) -> None:
        """Add fields and increments to the next write; they are lost where the process ends before."""
        change.add(self._noted)
        self._noted = change

    def write(self, change: Change) -> str:
        """Change the state in one step; return what an operator wants. Waits while Redis is unavailable.

        Raises:
            TakenOver: another process is the owner now.
            StateLost: the write before this one is gone, or that by which this process became the owner.
            redis.RedisError: Redis refuses the write, or is unavailable while the process stops.
        """
        change.add(self._noted)
        self._number += 1
        pairs = [part for pair in change.opened for part in pair]
        changes = msgspec.json.encode({"set": change.fields, "incr": change.increments})
        args = [self._token, self._take, self._number, changes, len(change.opened), *pairs, *change.closed]
        status, wanted = self.when_available(lambda: self._script(keys=[self._key, self._open_key], args=args))
        if status == b"lost":
            raise StateLost(f"{self.name}: Redis has lost writes that it had acknowledged, as after a failover")
        if status != b"ok":
            raise TakenOver(f"{self.name}: another process runs this backfill now; this one ends")
        self._noted = Change()
        return str(wanted.decode())

    def when_available(self, call: Callable[[], T]) -> T:
        """The result of a call, repeated while Redis is unavailable.

        Raises:
            redis.RedisError: waiting cannot cure the error, or the process stops.
        """
        outage = Outage(away_s=None)
        while True:
            try:
                found = call()
            except (redis.RedisError, OSError) as error:
                if self._is_stopping():
                    raise
                Event().wait(outage.pause(error).seconds)
            else:
                outage.end()
                return found

    def leave(self) -> None:
        """Give up the ownership, so that others see that no process runs it."""
        self.write(Change({"owner": ""}))

    def expire(self) -> None:
        """Let the state of an ended backfill go after a month."""
        self._redis.expire(self._key, KEPT_S)

    def open_jobs(self) -> Iterator[tuple[str, KeptRecord]]:
        """Yield (id, record) of all jobs whose answers are not written; may yield one twice."""
        found: Any = self._redis.hscan_iter(self._open_key, count=SCAN_COUNT)
        for job_id, raw in found:
            yield job_id.decode(), KeptRecord.from_bytes(raw)

    def records(self, ids: Sequence[str]) -> Iterator[tuple[str, KeptRecord]]:
        """Yield (id, record) of those of the ids that are open."""
        for portion in chunks(ids, SCAN_COUNT):
            replies: Any = self._redis.hmget(self._open_key, list(portion))
            yield from (
                (job_id, KeptRecord.from_bytes(raw))
                for job_id, raw in zip(portion, replies, strict=True)
                if raw is not None
            )


def list_backfills(client: redis.Redis) -> Iterator[tuple[str, Saved]]:
    """Yield (name, state) of all backfills, newest first; forgets those whose state is gone."""
    names: Any = client.zrevrange(BACKFILLS, 0, -1)
    for raw in names:
        name = raw.decode()
        saved = BackfillState(client, name).read()
        if saved is None:
            client.zrem(BACKFILLS, name)
        else:
            yield name, saved


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
