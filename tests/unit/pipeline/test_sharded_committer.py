"""Commits to several shards: each outcome goes to its shard, and waits take no room from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from shiwu.contract import Lane
from shiwu_worker.jobs.outcome import Outcome
from shiwu_worker.pipeline.sharded_committer import ShardedCommitter


class OneCommitter:
    """The committer of one shard, which commits when a test says so."""

    def __init__(self) -> None:
        self.put_jobs: list[Any] = []
        self.thread = SimpleNamespace(ask_to_end=lambda: None)

    def start(self, *, on_committed: Callable[[Any], None], on_released: Callable[[Any], None]) -> None:
        """Keep whom to tell."""
        self.on_committed, self.on_released = on_committed, on_released

    def put(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the jobs."""
        self.put_jobs += [outcome.job for outcome in outcomes]

    def close(self, *, timeout_s: float) -> bool:
        """Say whether anything is left."""
        return timeout_s > 0 and not self.put_jobs


def outcome(shard: int, lane: Lane) -> Any:
    """The end of an attempt."""
    return SimpleNamespace(job=SimpleNamespace(shard=shard, lane=lane))


def test_jobs_wait_for_their_own_shard_only() -> None:
    """They are counted by lane, until they are committed or the shard is back."""
    away: set[int] = set()
    waiting: list[Mapping[Lane, int]] = []
    told: list[Any] = []
    shards = [OneCommitter(), OneCommitter()]
    committer = ShardedCommitter(
        shards,  # type: ignore[arg-type]  # what the committer uses of them
        is_away=lambda shard: shard in away,
        report_away=lambda counts: waiting.append(dict(counts)),
    )
    committer.start(
        on_committed=lambda ended: told.append(("all", len(ended))),
        on_released=lambda ended: told.append(("released", len(ended))),
        on_committed_there=[lambda _: told.append("there 0"), lambda _: told.append("there 1")],
    )
    committer.put([outcome(1, Lane.BULK), outcome(0, Lane.INTERACTIVE), outcome(1, Lane.INTERACTIVE)])
    assert [[job.shard for job in each.put_jobs] for each in shards] == [[0], [1, 1]]
    assert waiting == []
    away.add(1)
    committer.update()
    committer.put([outcome(1, Lane.BULK)])
    shards[1].on_committed([outcome(1, Lane.BULK)])
    shards[1].on_released([outcome(1, Lane.INTERACTIVE)])
    away.clear()
    committer.update()
    assert told == [("all", 1), "there 1", ("released", 1)]
    assert [{lane: count for lane, count in each.items() if count} for each in waiting] == [
        {Lane.BULK: 1, Lane.INTERACTIVE: 1},
        {Lane.BULK: 2, Lane.INTERACTIVE: 1},
        {Lane.BULK: 1, Lane.INTERACTIVE: 1},
        {Lane.BULK: 1},
        {},
    ]
    assert not committer.close(timeout_s=1.0)
