"""How much waits and how much is worked on, as Redis knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from shiwu.contract import CLAIMS, COUNTERS, DEAD, DELAYED, SUSPECTS, WORKERS, Lane

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


def read_state(client: redis.Redis) -> QueueState:
    """What waits and what is claimed, lane by lane."""
    waiting = count_waiting(client, list(Lane))
    claimed = dict.fromkeys(Lane, 0)
    for _, record in client.hscan_iter(CLAIMS, count=1000):
        key = record.split(b"|", 3)[2].decode(errors="replace")
        claimed[next((lane for lane in Lane if key in lane.keys), Lane.BULK)] += 1
    seconds, micros = client.time()
    with client.pipeline(transaction=False) as pipe:
        pipe.zrangebyscore(WORKERS, seconds * 1000 + micros / 1000 - ALIVE_MS, "+inf")
        pipe.zcard(DELAYED)
        pipe.llen(SUSPECTS)
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
    )


def count_waiting(client: redis.Redis, lanes: Sequence[Lane]) -> dict[Lane, int]:
    """Messages in each lane, whatever their priority."""
    with client.pipeline(transaction=False) as pipe:
        for lane in lanes:
            for key in lane.keys:
                pipe.llen(key)
        lengths: list[Any] = pipe.execute()
    return {lane: sum(lengths[i * 4 : i * 4 + 4]) for i, lane in enumerate(lanes)}
