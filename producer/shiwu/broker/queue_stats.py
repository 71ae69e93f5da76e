"""Counts what waits and what is claimed, and shares the counts between workers as a queue snapshot."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.message_reader import read_message
from shiwu.broker.server_clock import server_time_ms, server_time_steps
from shiwu.broker.steps import Steps, run
from shiwu.contract import CLAIMS, COUNTERS, DEAD, DELAYED, QUARANTINE, QUEUE_SNAPSHOT, WORKERS, Lane, RequestError

WORKER_TIMEOUT_MS: Final = 10_000
"""A worker without a heartbeat for this long is not listed."""
MAX_DIGITS: Final = 20
"""Digits of a counter: Redis counts with 64 bits."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """Sizes of the queues, the workers that run, and totals since the database is in use."""

    waiting: dict[Lane, int]
    """Messages in each lane."""
    claimed: dict[Lane, int]
    """Jobs that a worker holds, by the lane that they came from."""
    delayed: int
    """Jobs that wait for a retry or a countdown."""
    quarantined: int
    """Jobs in quarantine: workers died twice while they held them, so they run one at a time."""
    dead: int
    """Dead letters."""
    workers: tuple[str, ...]
    """Names of workers with a heartbeat in the last ten seconds."""
    counters: dict[str, int]
    """Name → total since the database is in use: answered, answers_discarded, duplicates_dropped, reaped, …

    `results_bytes` and `dead_bytes` are what the scripts have counted of the results stream and the dead letters.
    """
    oldest_age_s: dict[Lane, float]
    """Seconds since the oldest waiting message was sent; absent where none waits or none has a time of sending."""
    shards: tuple[QueueState, ...] = ()
    """The sizes of each shard of a cluster, in the order of their indexes; empty on one server."""


def read_state(client: redis.Redis) -> QueueState:
    """Count the queues now; several round trips, which grow with the number of claimed jobs."""
    return run(client, state_steps())


def state_steps() -> Steps[QueueState]:
    """Count the queues now."""
    waiting = yield from waiting_steps(list(Lane))
    claimed = yield from _claimed_steps()
    now_ms = yield from server_time_steps()
    delayed, quarantined, dead, counters = yield _read_counts
    workers = yield from workers_steps(now_ms=now_ms)
    oldest = yield from _oldest_steps()
    return QueueState(
        waiting=waiting,
        claimed=claimed,
        delayed=delayed,
        quarantined=quarantined,
        dead=dead,
        workers=workers,
        counters={name.decode(errors="replace"): _number(value) for name, value in sorted(counters.items())},
        oldest_age_s={lane: max(0.0, now_ms - sent_ms) / 1000 for lane, sent_ms in oldest.items()},
    )


def sum_states(states: Sequence[QueueState]) -> QueueState:
    """The sizes of all shards together, with the state of each; at least one."""
    counters: Counter[str] = Counter()
    oldest: dict[Lane, float] = {}
    for state in states:
        counters.update(state.counters)
        for lane, age_s in state.oldest_age_s.items():
            oldest[lane] = max(age_s, oldest.get(lane, 0.0))
    return QueueState(
        waiting={lane: sum(state.waiting[lane] for state in states) for lane in Lane},
        claimed={lane: sum(state.claimed[lane] for state in states) for lane in Lane},
        delayed=sum(state.delayed for state in states),
        quarantined=sum(state.quarantined for state in states),
        dead=sum(state.dead for state in states),
        workers=tuple(sorted({name for state in states for name in state.workers})),
        counters=dict(sorted(counters.items())),
        oldest_age_s=oldest,
        shards=tuple(states),
    )


def _claimed_steps() -> Steps[dict[Lane, int]]:
    claimed = dict.fromkeys(Lane, 0)
    cursor = 0
    while True:
        cursor, records = yield partial(_scan_claims, cursor=cursor)
        for record in records.values():
            # A record that another program wrote may have fewer parts.
            key = b"".join(record.split(b"|", 3)[2:3]).decode(errors="replace")
            claimed[next((lane for lane in Lane if key in lane.keys), Lane.BULK)] += 1
        if cursor == 0:
            return claimed


def _scan_claims(client: Any, *, cursor: int) -> Any:
    return client.hscan(CLAIMS, cursor, count=1000)


def _read_counts(client: Any) -> Any:
    pipe = client.pipeline(transaction=False)
    pipe.zcard(DELAYED)
    pipe.llen(QUARANTINE)
    pipe.zcard(DEAD)
    pipe.hgetall(COUNTERS)
    return pipe.execute()


def read_workers(client: redis.Redis, *, now_ms: float | None = None) -> tuple[str, ...]:
    """Names of workers with a heartbeat in the last ten seconds.

    Args:
        now_ms: the server's time; None: it is asked for.
    """
    return run(client, workers_steps(now_ms=now_ms))


def workers_steps(*, now_ms: float | None = None) -> Steps[tuple[str, ...]]:
    """Ask for the names of workers with a heartbeat in the last ten seconds."""
    if now_ms is None:
        now_ms = yield from server_time_steps()
    begin_ms = now_ms - WORKER_TIMEOUT_MS
    names = yield lambda client: client.zrangebyscore(WORKERS, begin_ms, "+inf")
    return tuple(name.decode(errors="replace") for name in names)


def _number(value: bytes) -> int:
    """A counter; 0 where another program wrote something else."""
    return int(value) if value.isdigit() and len(value) < MAX_DIGITS else 0


def count_waiting(client: redis.Redis, lanes: Sequence[Lane]) -> dict[Lane, int]:
    """Messages of all priorities in each lane; one round trip."""
    return run(client, waiting_steps(lanes))


def waiting_steps(lanes: Sequence[Lane]) -> Steps[dict[Lane, int]]:
    """Count the messages of all priorities in each lane."""

    def read_lengths(client: Any) -> Any:
        pipe = client.pipeline(transaction=False)
        for lane in lanes:
            for key in lane.keys:
                pipe.llen(key)
        return pipe.execute()

    lengths = yield read_lengths
    return {lane: sum(lengths[i * 4 : i * 4 + 4]) for i, lane in enumerate(lanes)}


class QueueSnapshot(msgspec.Struct, frozen=True):
    """Sizes of the queues at one moment. One worker counts them, and the others read its snapshot from Redis.

    Times are in ms since 1970 by Redis' clock.
    """

    at_ms: float
    waiting: dict[Lane, int]
    claimed: dict[Lane, int]
    oldest_ms: dict[Lane, float]
    """When the oldest waiting message was sent; absent where the lane is empty or no message has a time of sending."""
    delayed: int
    quarantined: int
    dead: int
    answered: int
    """Total of answers since the database is in use."""


def shared_snapshot(client: redis.Redis, *, max_age_s: float) -> QueueSnapshot:
    """The newest snapshot in Redis, or a new one where that is older than `max_age_s`."""
    now_ms = server_time_ms(client)
    known = kept_snapshot(client)
    if known is not None and 0 <= now_ms - known.at_ms < max_age_s * 1000:
        return known
    # Without a lock: a worker that asks during the count gets the old snapshot or counts too.
    snapshot = count_snapshot(client, now_ms=now_ms)
    client.set(QUEUE_SNAPSHOT, msgspec.json.encode(snapshot), px=max(1, int(max_age_s * 1000)))
    return snapshot


def kept_snapshot(client: redis.Redis) -> QueueSnapshot | None:
    """The newest snapshot in Redis, of whatever age; None where there is none that this version can read."""
    kept: Any = client.get(QUEUE_SNAPSHOT)
    if kept is not None:
        with contextlib.suppress(msgspec.MsgspecError):
            return _SNAPSHOT.decode(kept)
    return None


def count_snapshot(client: redis.Redis, *, now_ms: float) -> QueueSnapshot:
    """Count the queues now; about 25 commands."""
    state = read_state(client)
    return QueueSnapshot(
        at_ms=now_ms,
        waiting=state.waiting,
        claimed=state.claimed,
        oldest_ms={lane: now_ms - age_s * 1000 for lane, age_s in state.oldest_age_s.items()},
        delayed=state.delayed,
        quarantined=state.quarantined,
        dead=state.dead,
        answered=state.counters.get("answered", 0),
    )


def _oldest_steps() -> Steps[dict[Lane, float]]:
    keys = [(lane, key) for lane in Lane for key in lane.keys]

    def read_oldest(client: Any) -> Any:
        pipe = client.pipeline(transaction=False)
        for _, key in keys:
            pipe.lindex(key, -1)
        return pipe.execute(raise_on_error=False)

    raws = yield read_oldest
    oldest: dict[Lane, float] = {}
    for (lane, _), raw in zip(keys, raws, strict=True):
        # The ACL of version 0.1 had no LINDEX for the sweep: then only the age is missing.
        if isinstance(raw, redis.ResponseError):
            continue
        with contextlib.suppress(RequestError):
            sent_ms = read_message(raw).sent_ms if raw is not None else None
            if sent_ms is not None:
                oldest[lane] = min(sent_ms, oldest.get(lane, sent_ms))
    return oldest


_SNAPSHOT: Final[msgspec.json.Decoder[QueueSnapshot]] = msgspec.json.Decoder(QueueSnapshot)
