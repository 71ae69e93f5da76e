"""The whole state of the server at one moment, read by what each key means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from shiwu.contract import (
    ATTEMPTS,
    CALL_REPLY,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DELAYED,
    DELAYED_MESSAGES,
    FOREIGN,
    HISTORIES,
    HISTORIES_EXPIRY,
    KEY_TYPES,
    LAST_CLAIM,
    LEASES,
    MARKS,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    QUARANTINE,
    RESULT_PREFIX,
    RESULT_STREAM,
    WORKER_STATE,
    Lane,
    done_key,
)
from tests.protocol.simulated_redis import SimulatedRedis, pairs

LANE_KEYS: Final = tuple(key for lane in Lane for key in lane.keys)
TYPES: Final[Mapping[str, str]] = {**KEY_TYPES, **dict.fromkeys(LANE_KEYS, "list")}
PREFIXES: Final = {
    done_key(""): "string",
    RESULT_PREFIX: "string",
    CALL_REPLY: "string",
    LAST_CLAIM: "string",
    WORKER_STATE: "string",
    FOREIGN: "",
}
"""Prefix of keys of one id, call or worker → their type; '' for any."""
_CLAIM: Final = re.compile(rb"([^|]*)\|(\d+)\|([^|]*)\|(.*)", re.DOTALL)
_TRIED: Final = re.compile(rb"(\d+)(?:/(\d+))?:(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Tried:
    """What is counted of an id."""

    attempts: int = 0
    deaths: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """One record of a claimed job."""

    token: str
    attempt: int
    lane: str
    raw: bytes


@dataclass(frozen=True)
class Snapshot:
    """What the server holds."""

    now_ms: int
    keys: Mapping[str, tuple[str, int, Any]] = field(repr=False)
    """Key → type, TTL in ms (-1 for none), value."""

    def value(self, key: str, kind: str) -> Any:
        """The value of a key; empty where there is none or it has another type."""
        found = self.keys.get(key)
        return found[2] if found is not None and found[0] == kind else ()

    def hash(self, key: str) -> Mapping[bytes, bytes]:
        """A hash."""
        return pairs(self.value(key, "hash"))

    def scores(self, key: str) -> Mapping[bytes, float]:
        """A sorted set."""
        return {member: float(score) for member, score in pairs(self.value(key, "zset")).items()}

    def of_ids(self, prefix: str) -> Mapping[str, bytes]:
        """The strings under a prefix, by what follows it."""
        return {
            key.removeprefix(prefix): value
            for key, (kind, _, value) in self.keys.items()
            if kind == "string" and key.startswith(prefix)
        }

    def ttl_ms(self, key: str) -> int:
        """How long the key lives; -1 without an end, -2 where there is none."""
        return self.keys[key][1] if key in self.keys else -2

    @cached_property
    def lanes(self) -> Mapping[str, list[bytes]]:
        """Lane key → messages, the newest first."""
        return {key: list(self.value(key, "list")) for key in LANE_KEYS}

    @cached_property
    def quarantine(self) -> list[bytes]:
        """`lane|message` of each quarantined job, the newest first."""
        return list(self.value(QUARANTINE, "list"))

    @cached_property
    def claims(self) -> Mapping[str, Claim]:
        """Claimed jobs."""
        found = {}
        for job_id, record in self.hash(CLAIMS).items():
            match = _CLAIM.fullmatch(record)
            assert match, f"a claim is readable: {record!r}"
            found[job_id.decode()] = Claim(match[1].decode(), int(match[2]), match[3].decode(), match[4])
        return found

    @cached_property
    def leases(self) -> Mapping[str, float]:
        """Ends of leases in ms."""
        return {job_id.decode(): end for job_id, end in self.scores(LEASES).items()}

    @cached_property
    def delayed(self) -> Mapping[str, bytes]:
        """`lane|message` of delayed jobs."""
        return {job_id.decode(): record for job_id, record in self.hash(DELAYED_MESSAGES).items()}

    @cached_property
    def due(self) -> Mapping[str, float]:
        """When delays end, in ms."""
        return {job_id.decode(): end for job_id, end in self.scores(DELAYED).items()}

    @cached_property
    def tried(self) -> Mapping[str, Tried]:
        """What is counted of ids; ids without a record are not contained."""
        found = {}
        for job_id, record in self.hash(ATTEMPTS).items():
            match = _TRIED.fullmatch(record)
            assert match, f"a record of attempts is readable: {record!r}"
            found[job_id.decode()] = Tried(int(match[1]), int(match[3]), int(match[2] or 0))
        return found

    @cached_property
    def marks(self) -> Mapping[str, bytes]:
        """Marks of answered ids."""
        marks = dict(self.of_ids(done_key("")))
        for key in MARKS:
            marks |= {job_id.decode(): mark for job_id, mark in self.hash(key).items()}
        return marks

    def mark_ttl_ms(self, job_id: str) -> int:
        """How long the mark of an id lives; -1 without an end, -2 where there is none."""
        keys = [key for key in MARKS if job_id.encode() in self.hash(key)]
        return max(map(self.ttl_ms, [*keys, done_key(job_id)]))

    @cached_property
    def results(self) -> Mapping[str, bytes]:
        """Results as Celery reads them."""
        return self.of_ids(RESULT_PREFIX)

    @cached_property
    def pending_answers(self) -> Mapping[str, bytes]:
        """Answers that wait for their message and its callbacks."""
        return {job_id.decode(): answer for job_id, answer in self.hash(PENDING_ANSWERS).items()}

    @cached_property
    def pending_expiry(self) -> Mapping[str, float]:
        """When pending answers are dropped, in ms."""
        return {job_id.decode(): end for job_id, end in self.scores(PENDING_ANSWERS_EXPIRY).items()}

    @cached_property
    def histories(self) -> Mapping[str, bytes]:
        """Earlier attempts by id."""
        return {job_id.decode(): text for job_id, text in self.hash(HISTORIES).items()}

    @cached_property
    def histories_expiry(self) -> Mapping[str, float]:
        """When histories are dropped, in ms."""
        return {job_id.decode(): end for job_id, end in self.scores(HISTORIES_EXPIRY).items()}

    @cached_property
    def stream(self) -> list[tuple[tuple[int, int], str, bytes]]:
        """Position, id and answer of each entry, the oldest first."""
        found = []
        for position, fields in self.value(RESULT_STREAM, "stream"):
            milliseconds, _, number = position.partition(b"-")
            named = pairs(fields)
            found.append(((int(milliseconds), int(number)), named[b"id"].decode(), named[b"answer"]))
        return found

    @cached_property
    def dead(self) -> Mapping[str, bytes]:
        """`lane|message` of dead letters."""
        return {job_id.decode(): record for job_id, record in self.hash(DEAD_MESSAGES).items()}

    @cached_property
    def dead_answers(self) -> Mapping[str, bytes]:
        """Answers of dead letters."""
        return {job_id.decode(): record for job_id, record in self.hash(DEAD_ANSWERS).items()}

    @cached_property
    def dead_times(self) -> Mapping[str, float]:
        """When dead letters ended, in ms."""
        return {job_id.decode(): end for job_id, end in self.scores(DEAD).items()}

    @cached_property
    def callbacks(self) -> Mapping[bytes, bytes]:
        """Callbacks that are not sent: member → record."""
        return self.hash(CANVAS)

    @cached_property
    def callbacks_due(self) -> Mapping[bytes, float]:
        """Ends of reservations in ms."""
        return self.scores(CANVAS_DUE)

    @cached_property
    def counters(self) -> Mapping[str, int]:
        """Totals."""
        return {name.decode(): int(total) for name, total in self.hash(COUNTERS).items()}

    @cached_property
    def places(self) -> list[tuple[str, bytes]]:
        """Where each waiting message is, once for each copy."""
        return list(self._places())

    def _places(self) -> Iterator[tuple[str, bytes]]:
        for key, raws in self.lanes.items():
            yield from ((key, raw) for raw in raws)
        yield from (("quarantine", record.partition(b"|")[2]) for record in self.quarantine)
        yield from (("delayed", record.partition(b"|")[2]) for record in self.delayed.values())
        yield from (("claimed", claim.raw) for claim in self.claims.values())

    @cached_property
    def waiting(self) -> frozenset[bytes]:
        """Messages that wait for their answer."""
        return frozenset(raw for _, raw in self.places)

    @cached_property
    def foreign(self) -> frozenset[str]:
        """Keys of ours with a value of another type."""
        return frozenset(
            key for key, (kind, _, _) in self.keys.items() if (wanted := type_of(key)) is not None and kind != wanted
        )


def type_of(key: str) -> str | None:
    """The type of a key of ours; None where any will do."""
    if key in TYPES:
        return TYPES[key]
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    return None if prefix is None else PREFIXES[prefix] or None


def is_known(key: str) -> bool:
    """Whether the contract names this key."""
    return key in TYPES or any(key.startswith(prefix) for prefix in PREFIXES)


def take(client: SimulatedRedis) -> Snapshot:
    """The state now."""
    flat = client.dump_all()
    keys = {flat[i].decode(): (flat[i + 1].decode(), flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)}
    return Snapshot(client.now_ms, keys)


def id_of(raw: bytes) -> str:
    """The id in a message of our own client."""
    job_id: str = json.loads(raw)["headers"]["id"]
    return job_id


def has_record(before: Snapshot, after: Snapshot, job_id: str) -> bool:
    """Whether callbacks are kept of one of the messages with this id."""
    raws = tuple(raw for _, raw in before.places if id_of(raw) == job_id)
    return any(record.endswith(raws) for record in after.callbacks.values())
