"""What a worker makes of the heartbeats of all workers in each shard."""

from __future__ import annotations

import pytest
import redis

from shiwu_worker.pipeline import shard_roles as module
from shiwu_worker.pipeline.shard_roles import NOTE_INTERVAL_S, ShardRoles
from shiwu_worker.policy.watchers import watchers_of
from tests.support.clock import Clock

SHARDS = 16
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the roles."""
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made.monotonic)
    return made


def test_worker_watches_all_shards_until_it_is_told(clock: Clock) -> None:
    """Then those that it watches by the names of each; a change is reported once."""
    changes: list[bool] = []
    roles = ShardRoles(SHARDS, worker="a", watchers=2, on_change=lambda: changes.append(True))
    assert all(map(roles.is_watcher, range(SHARDS)))
    for shard in range(SHARDS):
        roles.keep(shard, lambda: NAMES)
    mine = [shard for shard in range(SHARDS) if "a" in watchers_of(shard, NAMES, count=2)]
    assert [shard for shard in range(SHARDS) if roles.is_watcher(shard)] == mine
    assert len(changes) == SHARDS - len(mine) > 0
    clock.now_s += NOTE_INTERVAL_S
    for shard in range(SHARDS):
        roles.keep(shard, lambda: ["a", "b"])
    assert all(map(roles.is_watcher, range(SHARDS)))
    assert len(changes) == 2 * (SHARDS - len(mine))


def test_heartbeats_are_recorded_every_interval(clock: Clock) -> None:
    """And at each call after an error, until it succeeds."""
    calls: list[float] = []
    roles = ShardRoles(1, worker="a", watchers=2)

    def note() -> list[str]:
        calls.append(clock.now_s)
        if len(calls) == 2:
            raise redis.ConnectionError
        return NAMES

    began_s = clock.now_s
    for _ in range(10):
        if len(calls) == 1 and clock.now_s >= began_s + NOTE_INTERVAL_S:
            with pytest.raises(redis.ConnectionError):
                roles.keep(0, note)
        else:
            roles.keep(0, note)
        clock.now_s += 1.0
    assert calls == [began_s + after_s for after_s in (0, 3, 4, 7)]
    assert roles.round_pause_s == 0.05
