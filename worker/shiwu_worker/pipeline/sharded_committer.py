"""Commits to each shard on a thread of its own, so that a shard that is away holds up no other."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from shiwu.contract import Lane
    from shiwu_worker.jobs.outcome import CommittedJob, Outcome, Released
    from shiwu_worker.runtime.threads import ServiceThread
    from shiwu_worker.stages.commit import Committer

Ended = TypeVar("Ended", bound="CommittedJob | Released")


class ShardedCommitter:
    """Passes each outcome to the committer of its job's shard.

    Jobs that wait for a shard that is away keep no room from the jobs of others. No more are claimed from such a
    shard, so they are bounded by what was in flight.

    Args:
        committers: one of each shard, in the order of their indexes.
        is_away: whether a shard is away.
        report_away: gets how many jobs of each lane wait for shards that are away, after each change.
    """

    def __init__(
        self,
        committers: Sequence[Committer],
        *,
        is_away: Callable[[int], bool],
        report_away: Callable[[Mapping[Lane, int]], None],
    ) -> None:
        self._committers = committers
        self._is_away = is_away
        self._report_away = report_away
        self._lock = threading.Lock()
        self._waiting: list[Counter[Lane]] = [Counter() for _ in committers]
        self._has_away = False
        self._one_at_a_time = threading.Lock()

    @property
    def threads(self) -> list[ServiceThread]:
        """The threads of all shards."""
        return [committer.thread for committer in self._committers]

    def start(
        self,
        *,
        on_committed: Callable[[Sequence[CommittedJob]], None],
        on_released: Callable[[Sequence[Released]], None],
        on_committed_there: Sequence[Callable[[Sequence[CommittedJob]], None]],
    ) -> None:
        """Start all threads.

        Args:
            on_committed, on_released: as for `Committer.start`; called on the thread of any shard, one call at a time.
            on_committed_there: one for each shard, called on its thread afterwards; may ask that shard.
        """
        for shard, committer in enumerate(self._committers):
            committer.start(
                on_committed=self._counting(shard, on_committed, then=on_committed_there[shard]),
                on_released=self._counting(shard, on_released),
            )

    def _counting(
        self,
        shard: int,
        subscriber: Callable[[Sequence[Ended]], None],
        *,
        then: Callable[[Sequence[Ended]], None] = lambda _: None,
    ) -> Callable[[Sequence[Ended]], None]:
        def call(ended: Sequence[Ended]) -> None:
            with self._lock:
                self._waiting[shard].subtract(each.job.lane for each in ended)
            with self._one_at_a_time:
                subscriber(ended)
            self.update()
            then(ended)

        return call

    def put(self, outcomes: Sequence[Outcome]) -> None:
        """Take jobs whose attempt has ended. Never blocks."""
        by_shard: dict[int, list[Outcome]] = {}
        for outcome in outcomes:
            by_shard.setdefault(outcome.job.shard, []).append(outcome)
        with self._lock:
            for shard, portion in by_shard.items():
                self._waiting[shard].update(outcome.job.lane for outcome in portion)
        for shard, portion in by_shard.items():
            self._committers[shard].put(portion)
        self.update()

    def close(self, *, timeout_s: float) -> bool:
        """Commit what was put, for `timeout_s` at most; True when nothing is left."""
        until_s = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.ask_to_end()
        ended = [each.close(timeout_s=max(0.0, until_s - time.monotonic())) for each in self._committers]
        return all(ended)

    def update(self) -> None:
        """Count the jobs that wait for shards that are away; to be called when that changes."""
        with self._lock:
            away: Counter[Lane] = Counter()
            for shard, waiting in enumerate(self._waiting):
                if self._is_away(shard):
                    away.update(waiting)
            if away or self._has_away:
                self._has_away = bool(away)
                self._report_away(away)
