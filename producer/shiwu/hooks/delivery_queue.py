"""Deliveries in Redis: added with the acknowledgement of their answers, taken under a lease, tried again, given up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Literal

import msgspec
import redis

from shiwu.broker.chunks import chunks
from shiwu.broker.script_loader import Script
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import (
    HOOKS_DEAD,
    HOOKS_DEAD_DELIVERIES,
    HOOKS_DELIVERIES,
    HOOKS_DUE,
    HOOKS_HEALTH,
    HOOKS_PENDING,
    RESULT_STREAM,
)

COMMON_KEYS: Final = (HOOKS_DELIVERIES, HOOKS_DUE, HOOKS_HEALTH, HOOKS_DEAD, HOOKS_DEAD_DELIVERIES)
"""The first keys of every script."""
MAX_ENDPOINTS_AT_ONCE: Final = 1000
ALONE_AFTER: Final = 10
"""Failures in a row after which an endpoint gets one try at a time."""
CHUNK_SIZE: Final = 200
"""Dead deliveries that are read or revived in one call."""


class Payload(msgspec.Struct, frozen=True):
    """What a delivery sends, in the form that Redis keeps: this as one line of JSON, and the body after it."""

    count: int
    """Answers in the body."""
    url: str | None = None
    """The URL of the request; None for endpoints of the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDelivery:
    """A delivery to add. `dead_reason` is a word for a delivery that is given up immediately, and otherwise empty."""

    endpoint: str
    id: str
    payload: Payload
    body: bytes
    dead_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A delivery that Redis holds."""

    endpoint: str
    id: str
    created_ms: int
    failed: int
    """Tries that failed."""
    take: int
    """How often it was taken; a process may end only its own take."""
    payload: Payload
    body: bytes


@dataclass(frozen=True, slots=True)
class TryEnd:
    """How a try of a delivery ended."""

    outcome: Literal["delivered", "retry", "dead"]
    reason: str = ""
    delay_s: float = 0.0
    pause_s: float = 0.0
    """How long the whole endpoint gets no try."""
    is_disabling: bool = False
    """Whether the endpoint gets no try any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadDelivery:
    """A delivery that was given up, when by Redis' clock, and why."""

    delivery: Delivery
    died_ms: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointHealth:
    """How an endpoint does; times are in ms of Redis' clock, 0 where there is none."""

    failures: int = 0
    """Failures in a row."""
    not_before_ms: int = 0
    disabled_ms: int = 0
    last_failure_ms: int = 0
    reason: str = ""
    """Of the last failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """Limits of the queue; durations are in seconds."""

    lease_s: float = 60.0
    alone_after: int = ALONE_AFTER
    alone_every_s: float = 60.0
    max_age_s: float = 2 * 86_400.0
    max_dead: int = 10_000


class DeliveryQueue:
    """The queue of deliveries. Thread-safe. Every method may raise `redis.RedisError`; repeating a call is safe."""

    def __init__(self, client: redis.Redis, options: QueueOptions) -> None:
        self._client = client
        self._options = options
        self._add, self._take, self._settle, self._revive = (
            load_script(client, name) for name in ("add", "take", "settle", "revive")
        )

    def add(self, deliveries: Sequence[NewDelivery], *, group: str, entry_ids: Sequence[str]) -> int:
        """Add deliveries, and acknowledge the stream entries that they come from; return how many were added."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(each.endpoint for each in deliveries), 1)}
        args: list[Any] = [group, self._options.max_dead, len(entry_ids), *entry_ids]
        for each in deliveries:
            payload = msgspec.json.encode(each.payload) + b"\n" + each.body
            args += [numbers[each.endpoint], each.endpoint, each.id, each.dead_reason, payload]
        added: int = self._add(keys=[*COMMON_KEYS, RESULT_STREAM, *map(pending_key, numbers)], args=args)
        return added

    def due_endpoints(self, *, now_ms: float) -> list[str]:
        """The endpoints that may have deliveries which are due, the longest due first."""
        found: Any = self._client.zrangebyscore(HOOKS_DUE, "-inf", now_ms, start=0, num=MAX_ENDPOINTS_AT_ONCE)
        return [name.decode() for name in found]

    def take(self, endpoint: str, *, count: int) -> list[Delivery]:
        """Take up to `count` deliveries; 0 only gives up those that are too old."""
        options = self._options
        args = (
            *(endpoint, count, int(options.lease_s * 1000), options.alone_after, int(options.alone_every_s * 1000)),
            *(int(options.max_age_s * 1000), options.max_dead),
        )
        reply: list[bytes] = self._take(keys=[*COMMON_KEYS, pending_key(endpoint)], args=args)
        return [_read(endpoint, name.decode(), record) for name, record in zip(reply[::2], reply[1::2], strict=True)]

    def delivered(self, delivery: Delivery) -> None:
        """Remove a delivery that was made."""
        self._end(delivery, TryEnd("delivered"))

    def retry(self, delivery: Delivery, *, reason: str, delay_s: float, pause_s: float = 0.0) -> None:
        """Let a delivery be taken again after a delay.

        Args:
            pause_s: how long the whole endpoint gets no try, in seconds.
        """
        self._end(delivery, TryEnd("retry", reason, delay_s, pause_s))

    def give_up(self, delivery: Delivery, *, reason: str, is_disabling: bool = False) -> None:
        """Make a delivery a dead one; `is_disabling` ends all tries at its endpoint."""
        self._end(delivery, TryEnd("dead", reason, is_disabling=is_disabling))

    def _end(self, delivery: Delivery, end: TryEnd) -> None:
        args = (
            *(delivery.endpoint, delivery.id, delivery.take),
            *(end.outcome, int(end.delay_s * 1000), int(end.pause_s * 1000), int(end.is_disabling), end.reason),
            *(self._options.max_dead, delivery.failed),
        )
        self._settle(keys=[*COMMON_KEYS, pending_key(delivery.endpoint)], args=args)

    # -------------------------------------------------------------------------------- for operators
    def dead(self, *, endpoint: str | None = None, limit: int | None = None) -> Iterator[DeadDelivery]:
        """Yield dead deliveries, newest first."""
        start, yielded = 0, 0
        while limit is None or yielded < limit:
            page: Any = self._client.zrange(HOOKS_DEAD, start, start + CHUNK_SIZE - 1, desc=True, withscores=True)
            if not page:
                return
            start += len(page)
            records: Any = self._client.hmget(HOOKS_DEAD_DELIVERIES, [field for field, _ in page])
            for (field, died_ms), kept in zip(page, records, strict=True):
                name, _, webhook_id = field.decode().partition("|")
                if kept is None or endpoint not in {None, name}:
                    continue
                reason, _, record = kept.partition(b"|")
                yield DeadDelivery(
                    delivery=_read(name, webhook_id, record), died_ms=died_ms, reason=reason.decode(errors="replace")
                )
                yielded += 1
                if yielded == limit:
                    return

    def revive(self, deliveries: Sequence[tuple[str, str]], *, endpoints: Sequence[str] = ()) -> int:
        """Make dead deliveries, as (endpoint, webhook id), due again; return how many there were.

        The endpoints of the deliveries, and those of `endpoints`, are enabled and count as healthy.
        """
        revived = 0
        for portion in chunks(list(deliveries), CHUNK_SIZE) if deliveries else [[]]:
            names = list(dict.fromkeys([*endpoints, *(endpoint for endpoint, _ in portion)]))
            args: list[Any] = [len(names), *names]
            for endpoint, webhook_id in portion:
                args += [names.index(endpoint) + 1, webhook_id]
            revived += self._revive(keys=[*COMMON_KEYS, *map(pending_key, names)], args=args)
        return revived

    def health(self) -> dict[str, EndpointHealth]:
        """The health of every endpoint that has failed."""
        found: Any = self._client.hgetall(HOOKS_HEALTH)
        return {name.decode(): read_health(text) for name, text in found.items()}

    def pending(self, endpoints: Sequence[str]) -> Mapping[str, int]:
        """How many deliveries wait for each of these endpoints, those that are taken included."""
        if not endpoints:
            return {}
        with self._client.pipeline(transaction=False) as pipe:
            for endpoint in endpoints:
                pipe.zcard(pending_key(endpoint))
            return dict(zip(endpoints, pipe.execute(), strict=True))

    def endpoints_with_deliveries(self) -> list[str]:
        """Every endpoint for which a delivery waits, at most 1000."""
        found: Any = self._client.zrange(HOOKS_DUE, 0, MAX_ENDPOINTS_AT_ONCE - 1)
        return [name.decode() for name in found]

    def now_ms(self) -> float:
        """The clock of Redis, in ms since 1970."""
        return server_time_ms(self._client)

    def dead_count(self) -> int:
        """How many dead deliveries there are."""
        return int(self._client.zcard(HOOKS_DEAD))


def pending_key(endpoint: str) -> str:
    """The sorted set of the deliveries of an endpoint."""
    return f"{HOOKS_PENDING}{endpoint}"


def read_health(text: bytes) -> EndpointHealth:
    """The health that a script wrote; that of a new endpoint where the text has another form."""
    parts = text.decode(errors="replace").split("|", 4)
    if len(parts) != 5 or not all(part.isdigit() for part in parts[:4]):
        return EndpointHealth()
    failures, not_before_ms, disabled_ms, last_ms = map(int, parts[:4])
    return EndpointHealth(
        failures=failures,
        not_before_ms=not_before_ms,
        disabled_ms=disabled_ms,
        last_failure_ms=last_ms,
        reason=parts[4],
    )


def _read(endpoint: str, webhook_id: str, record: bytes) -> Delivery:
    created, failed, take, payload = record.split(b"|", 3)
    head, _, body = payload.partition(b"\n")
    return Delivery(
        endpoint=endpoint,
        id=webhook_id,
        created_ms=int(created),
        failed=int(failed),
        take=int(take),
        payload=msgspec.json.decode(head, type=Payload),
        body=body,
    )


def load_script(client: redis.Redis, name: str) -> Script:
    """The script `scripts/<name>.lua` after `records.lua`. Nothing is sent before its first call."""
    folder = files("shiwu.hooks").joinpath("scripts")
    source = "".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in ("records", name))
    script: Script = client.register_script(source)
    return script
