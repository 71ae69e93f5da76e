"""How much waits and how much is worked on, as Redis knows it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.message_reader import read_message
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import CLAIMS, COUNTERS, DEAD, DELAYED, QUARANTINE, QUEUE_SNAPSHOT, WORKERS, Lane, RequestError

ALIVE_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class QueueState:
    """How much waits, how much is being worked on."""

    waiting: dict[Lane, int]
    claimed: dict[Lane, int]
    delayed: int
    suspects: int
    """Jobs whose workers died twice; they are worked on one at a time."""
    dead: int
    workers: tuple[str, ...]
    """Workers that gave a sign of life in the last ten seconds."""
    counters: dict[str, int]
    """Totals since the database is in use: answered, answers_discarded, copies_dropped, reaped, results_dropped, …"""
    oldest_age_s: dict[Lane, float]
    """Age of the oldest waiting message; absent where none waits, or none says when it was sent."""


def read_state(client: redis.Redis) -> QueueState:
    """What waits and what is claimed, lane by lane."""
    waiting = count_waiting(client, list(Lane))
    claimed = dict.fromkeys(Lane, 0)
    for _, record in client.hscan_iter(CLAIMS, count=1000):
        key = record.split(b"|", 3)[2].decode(errors="replace")
        claimed[next((lane for lane in Lane if key in lane.keys), Lane.BULK)] += 1
    now_ms = server_time_ms(client)
    with client.pipeline(transaction=False) as pipe:
        pipe.zrangebyscore(WORKERS, now_ms - ALIVE_MS, "+inf")
        pipe.zcard(DELAYED)
        pipe.llen(QUARANTINE)
        pipe.zcard(DEAD)
        pipe.hgetall(COUNTERS)
        alive, delayed, suspects, dead, counters = pipe.execute()
    return QueueState(
        waiting=waiting,
        claimed=claimed,
        delayed=delayed,
        suspects=suspects,
        dead=dead,
        workers=tuple(name.decode(errors="replace") for name in alive),
        counters={name.decode(): int(value) for name, value in sorted(counters.items())},
        oldest_age_s={lane: max(0.0, now_ms - sent_ms) / 1000 for lane, sent_ms in _oldest(client).items()},
    )


def count_waiting(client: redis.Redis, lanes: Sequence[Lane]) -> dict[Lane, int]:
    """Messages in each lane, whatever their priority."""
    with client.pipeline(transaction=False) as pipe:
        for lane in lanes:
            for key in lane.keys:
                pipe.llen(key)
        lengths: list[Any] = pipe.execute()
    return {lane: sum(lengths[i * 4 : i * 4 + 4]) for i, lane in enumerate(lanes)}


class QueueSnapshot(msgspec.Struct, frozen=True):
    """The queues at one moment, as all workers share it so that only one of them has to look.

    Lanes are written by name; times are of Redis' clock.
    """

    at_ms: float
    waiting: dict[Lane, int]
    claimed: dict[Lane, int]
    oldest_ms: dict[Lane, float]
    """When the oldest waiting message of the lane was sent; absent where the lane is empty or no message says it."""
    delayed: int
    suspects: int
    dead: int
    answered: int
    """Answers since the database is in use."""


def shared_snapshot(client: redis.Redis, *, max_age_s: float) -> QueueSnapshot:
    """What waits and is worked on, not older than `max_age_s`; of many who ask in this time one counts for all."""
    now_ms = server_time_ms(client)
    kept: Any = client.get(QUEUE_SNAPSHOT)
    if kept is not None:
        with contextlib.suppress(msgspec.MsgspecError):
            known = _LOOK.decode(kept)
            if 0 <= now_ms - known.at_ms < max_age_s * 1000:
                return known
    # Whoever asks beside us while we count gets what was known before, or counts too.
    state = read_state(client)
    seen = QueueSnapshot(
        at_ms=now_ms,
        waiting=state.waiting,
        claimed=state.claimed,
        oldest_ms={lane: now_ms - age_s * 1000 for lane, age_s in state.oldest_age_s.items()},
        delayed=state.delayed,
        suspects=state.suspects,
        dead=state.dead,
        answered=state.counters.get("answered", 0),
    )
    client.set(QUEUE_SNAPSHOT, msgspec.json.encode(seen), px=max(1, int(max_age_s * 1000)))
    return seen


def _oldest(client: redis.Redis) -> dict[Lane, float]:
    keys = [(lane, key) for lane in Lane for key in lane.keys]
    with client.pipeline(transaction=False) as pipe:
        for _, key in keys:
            pipe.lindex(key, -1)
        raws: list[Any] = pipe.execute(raise_on_error=False)
    oldest: dict[Lane, float] = {}
    for (lane, _), raw in zip(keys, raws, strict=True):
        # An ACL user without LINDEX, as the sweep had in version 0.1, can read everything but the age.
        if isinstance(raw, redis.ResponseError):
            continue
        with contextlib.suppress(RequestError):
            sent_ms = read_message(raw).sent_ms if raw is not None else None
            if sent_ms is not None:
                oldest[lane] = min(sent_ms, oldest.get(lane, sent_ms))
    return oldest


_LOOK: Final[msgspec.json.Decoder[QueueSnapshot]] = msgspec.json.Decoder(QueueSnapshot)
