"""Reads what `shiwu top` shows of the shards of a cluster: each as one server, then all together."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final, Protocol, Self

import redis

from shiwu.broker.sharding import ShardRedis, node_of
from shiwu.contract import Lane
from shiwu.top.look import LaneLook, Letter, Look, ShardLook, WorkerLook
from shiwu.top.reader import MAX_LETTERS, SAMPLE, LookReader, failures_of, stages_of

MAX_THREADS: Final = 16
"""Shards that are read at the same time, so that one that hangs costs the others no time-out."""


class Reader(Protocol):
    """Reads the service, on one server or over shards."""

    def look(self) -> Look:
        """Read the service; an error is told in `problem`."""

    def read(self) -> Look:
        """Read the service.

        Raises:
            redis.RedisError: Redis is unavailable, or refuses a command.
        """

    def letters(self, code: str) -> list[Letter]:
        """The newest dead letters with this code, newest first; asks nothing of Redis."""

    def list_soon(self) -> None:
        """Let the next look list workers, dead letters and backfills again."""


class ShardsReader:
    """Reads one look after the other. Used by one thread at a time; `letters` by any. The caller closes it.

    Args:
        clients: one for each shard, without retries.
        clock: gives monotonic seconds.
    """

    def __init__(self, clients: Sequence[ShardRedis], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = tuple(clients)
        self._readers = [LookReader(client, clock=clock) for client in clients]
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, len(self._readers)), thread_name_prefix="look")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def look(self) -> Look:
        """Read all shards. The figures of a shard that is unavailable are those of its last look."""
        looks = list(self._pool.map(LookReader.look, self._readers))
        nodes = list(self._pool.map(_node, self._clients))
        return self._sum(looks, nodes)

    def read(self) -> Look:
        """Read all shards.

        Raises:
            redis.RedisError: no shard is available, or one refuses a command.
        """
        look = self.look()
        if all(shard.problem is not None for shard in look.shards):
            return self._readers[0].read()
        return look

    def letters(self, code: str) -> list[Letter]:
        """The dead letters with this code, newest first, among the newest 500 of all shards."""
        return [letter for letter in self._newest_letters() if letter.code == code]

    def list_soon(self) -> None:
        """Let the next look list workers, dead letters and backfills again."""
        for reader in self._readers:
            reader.list_soon()

    def _newest_letters(self) -> list[Letter]:
        known = [list(reader.known_letters) for reader in self._readers]
        return list(islice(heapq.merge(*known, key=lambda letter: -letter.died_ms), MAX_LETTERS))

    def _sum(self, looks: Sequence[Look], nodes: Sequence[str]) -> Look:
        at_ms = max(look.at_ms for look in looks)
        share = -(-SAMPLE // len(self._readers))
        timings = [answer.timing for reader in self._readers for answer in reader.newest(share) if answer.ok]
        letters = self._newest_letters()
        away = [(index, look) for index, look in enumerate(looks) if look.problem is not None]
        return Look(
            at_ms=at_ms,
            problem=_problem(away, count=len(looks)),
            away_s=max((look.away_s for _, look in away), default=0.0),
            answers_per_s=_sum_known([look.answers_per_s for look in looks]),
            answered=sum(look.answered for look in looks),
            delayed=sum(look.delayed for look in looks),
            quarantined=sum(look.quarantined for look in looks),
            dead=sum(look.dead for look in looks),
            lanes=_lanes(looks),
            stages=stages_of(timings),
            sample=len(timings),
            workers=_workers(looks),
            failures=failures_of(letters, now_ms=at_ms),
            dead_read=len(letters),
            backfills=tuple(backfill for look in looks for backfill in look.backfills),
            shards=tuple(
                _shard(index, look, node) for index, (look, node) in enumerate(zip(looks, nodes, strict=True))
            ),
        )


def _node(client: ShardRedis) -> str:
    try:
        return node_of(client)
    except (redis.RedisError, OSError):
        return ""


def _problem(away: Sequence[tuple[int, Look]], *, count: int) -> str | None:
    if not away:
        return None
    index, look = away[0]
    return f"{len(away)} of {count} shards, shard {index}: {look.problem}"


def _shard(index: int, look: Look, node: str) -> ShardLook:
    waiting = {each.lane: each.waiting for each in look.lanes}
    return ShardLook(
        index=index,
        node=node,
        interactive=waiting.get(Lane.INTERACTIVE, 0),
        bulk=waiting.get(Lane.BULK, 0),
        claimed=sum(each.claimed for each in look.lanes),
        delayed=look.delayed,
        quarantined=look.quarantined,
        dead=look.dead,
        answers_per_s=look.answers_per_s,
        problem=look.problem,
    )


def _lanes(looks: Sequence[Look]) -> tuple[LaneLook, ...]:
    found: list[LaneLook] = []
    for lane in Lane:
        own = [each for look in looks for each in look.lanes if each.lane is lane]
        if own:
            found.append(_lane(lane, own))
    return tuple(found)


def _lane(lane: Lane, own: Sequence[LaneLook]) -> LaneLook:
    return LaneLook(
        lane=lane,
        waiting=sum(each.waiting for each in own),
        claimed=sum(each.claimed for each in own),
        in_per_s=_sum_known([each.in_per_s for each in own]),
        out_per_s=_sum_known([each.out_per_s for each in own]),
        oldest_s=max((each.oldest_s for each in own if each.oldest_s is not None), default=None),
        # The workers serve all shards at the same time, so the lane is empty when its last shard is.
        backlog_s=max(each.backlog_s for each in own),
        history=_sum_histories([each.history for each in own]),
    )


def _sum_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 1) if known else None


def _sum_histories(histories: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sums from the newest value, which is the last one; a shorter history has nothing before."""
    length = max(map(len, histories))
    return tuple(
        sum(history[len(history) - back] for history in histories if back <= len(history))
        for back in range(length, 0, -1)
    )


def _workers(looks: Sequence[Look]) -> tuple[WorkerLook, ...]:
    """The workers of all shards, each once: one has a heartbeat in every shard, and tells of itself in the first."""
    found: dict[str, WorkerLook] = {}
    for look in looks:
        for worker in look.workers:
            if worker.name not in found or found[worker.name].state is None:
                found[worker.name] = worker
    return tuple(found[name] for name in sorted(found))
