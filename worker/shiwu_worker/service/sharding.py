"""Makes what takes the place of one lease queue, one committer and one queue snapshot where there are shards."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import redis

from shiwu.broker.queue_stats import QueueSnapshot, shared_snapshot
from shiwu.broker.sharding import cluster_shard
from shiwu.contract import Lane
from shiwu_worker.pipeline.heartbeat import ShardDuties
from shiwu_worker.pipeline.shard_roles import ShardRoles
from shiwu_worker.pipeline.sharded_committer import ShardedCommitter
from shiwu_worker.runtime.shard_health import ShardBackoff, ShardHealth
from shiwu_worker.stages.claim.lane_watch import LaneWatch
from shiwu_worker.stages.claim.shard_claims import ShardClaims
from shiwu_worker.stages.claim.sharded_claims import ShardedClaims
from shiwu_worker.stages.commit import Committer

if TYPE_CHECKING:
    from collections.abc import Callable

    from shiwu.broker.sharding import ClusterNodes
    from shiwu_worker.errors import FatalError
    from shiwu_worker.pipeline.in_flight import InFlightJobs
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.runtime.progress import Progress
    from shiwu_worker.runtime.threads import ServiceThread
    from shiwu_worker.service.factories import QueueParts


class ShardedParts:
    """The claims, the committer and the health of all shards.

    Args:
        lanes: those that the worker serves.
        watchers: how many workers do the maintenance of each shard.
        close_timeout_s: how long the last commands of a worker that stops may take.
    """

    def __init__(
        self,
        queues: Sequence[QueueParts],
        in_flight: InFlightJobs,
        nodes: ClusterNodes,
        *,
        lanes: Collection[Lane],
        worker: str,
        watchers: int,
        progress: Progress,
        observer: PipelineObserver,
        on_fatal: Callable[[FatalError], None],
        close_timeout_s: float,
    ) -> None:
        self._progress = progress
        self._observer = observer
        self._in_flight = in_flight
        self._queues = queues
        self.roles = ShardRoles(len(queues), worker=worker, watchers=watchers, on_change=self._look_again)
        self.health = ShardHealth(len(queues), on_change=self._on_change)
        self._waiting = dict.fromkeys(range(len(queues)), 0)
        changed = threading.Condition()
        shards = [
            ShardClaims(
                queue.shard,
                queue.lease_queue,
                changed=changed,
                backoff=self.backoff("claim", queue.shard),
                on_fatal=on_fatal,
                on_dry=partial(self._look_at, queue.shard),
            )
            for queue in queues
        ]
        self._lane_watch = self._make_lane_watch(shards, nodes, lanes=lanes, on_fatal=on_fatal)
        self.claims = ShardedClaims(
            shards,
            changed=changed,
            is_away=self.health.is_away,
            runs_nothing=in_flight.runs_nothing,
            close_timeout_s=close_timeout_s,
            on_close=self._lane_watch.close,
        )
        self.claim_threads: list[ServiceThread] = [*(shard.thread for shard in shards), self._lane_watch.thread]
        self.committer = ShardedCommitter(
            [self._make_committer(queue, worker=worker, on_fatal=on_fatal) for queue in queues],
            is_away=self.health.is_away,
            report_away=in_flight.set_away,
        )

    def _make_lane_watch(
        self,
        shards: Sequence[ShardClaims],
        nodes: ClusterNodes,
        *,
        lanes: Collection[Lane],
        on_fatal: Callable[[FatalError], None],
    ) -> LaneWatch:
        return LaneWatch(
            [(cluster_shard(shard.index), shard) for shard in shards],
            nodes,
            lanes=lanes,
            is_watched=self.roles.is_watcher,
            round_pause_s=lambda: self.roles.round_pause_s,
            on_fatal=on_fatal,
        )

    def _look_again(self) -> None:
        self._lane_watch.wake()

    def _look_at(self, shard: int) -> None:
        self._lane_watch.look_at(shard)

    def _make_committer(self, queue: QueueParts, *, worker: str, on_fatal: Callable[[FatalError], None]) -> Committer:
        return Committer(
            queue.answer_store,
            worker=worker,
            release=queue.lease_queue.release,
            backoff=self.backoff("commit", queue.shard),
            on_fatal=on_fatal,
            shard=queue.shard,
        )

    def backoff(self, where: str, shard: int) -> ShardBackoff:
        """The pauses of one thread. A worker that waits for Redis is not stuck, so each pause counts as progress."""
        return ShardBackoff(where, shard=shard, health=self.health, on_wait=lambda _: self._progress.mark())

    def heartbeat_backoff(self, shard: int) -> ShardBackoff:
        """The pauses of a heartbeat, which are no progress."""
        return ShardBackoff("heartbeat", shard=shard, health=self.health)

    def duties(self, shard: int) -> ShardDuties:
        """What the heartbeat of a shard does in its own way."""
        return ShardDuties(
            index=shard,
            ids=partial(self._in_flight.ids_of, shard),
            report_redis=self._report_redis,
            waiting=self._waiting,
            note_worker=partial(self.roles.keep, shard, self._queues[shard].maintenance.note_worker),
            is_watched=partial(self.roles.is_watcher, shard),
        )

    def _report_redis(self, _is_available: bool) -> None:
        """Report at each tick of a heartbeat whether any shard answers."""
        self._observer.redis_available(available=self.health.away < self.health.count)

    def _on_change(self, shard: int, is_away: bool) -> None:
        self._observer.shard_away(shard, is_away=is_away)
        self.committer.update()
        self.claims.notify()


def snapshot_of_shards(
    clients: Sequence[redis.Redis], *, max_age_s: float, is_away: Callable[[int], bool]
) -> QueueSnapshot:
    """The sizes of the queues in all shards that answer.

    Raises:
        redis.RedisError: no shard answers.
    """
    found: list[QueueSnapshot] = []
    failure: redis.RedisError | None = None
    for shard, client in enumerate(clients):
        if not is_away(shard):
            try:
                found.append(shared_snapshot(client, max_age_s=max_age_s))
            except redis.RedisError as error:
                failure = error
    if not found:
        raise failure or redis.ConnectionError("expected a shard that answers, got none")
    return sum_snapshots(found)


def sum_snapshots(snapshots: Sequence[QueueSnapshot]) -> QueueSnapshot:
    """One snapshot of several servers, whose clocks may differ."""
    at_ms = max(snapshot.at_ms for snapshot in snapshots)
    oldest: dict[Lane, float] = {}
    for snapshot in snapshots:
        for lane, sent_ms in snapshot.oldest_ms.items():
            at_common_ms = sent_ms + at_ms - snapshot.at_ms
            oldest[lane] = min(at_common_ms, oldest.get(lane, at_common_ms))
    return QueueSnapshot(
        at_ms=at_ms,
        waiting=_sum_lanes([snapshot.waiting for snapshot in snapshots]),
        claimed=_sum_lanes([snapshot.claimed for snapshot in snapshots]),
        oldest_ms=oldest,
        delayed=sum(snapshot.delayed for snapshot in snapshots),
        quarantined=sum(snapshot.quarantined for snapshot in snapshots),
        dead=sum(snapshot.dead for snapshot in snapshots),
        answered=sum(snapshot.answered for snapshot in snapshots),
    )


def _sum_lanes(counts: Sequence[Mapping[Lane, int]]) -> dict[Lane, int]:
    return {lane: sum(each.get(lane, 0) for each in counts) for lane in Lane}
