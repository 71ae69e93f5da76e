"""Which shards this worker watches, as the heartbeats of all workers say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Final

from shiwu_worker.policy.watchers import round_pause_s, watchers_of

NOTE_INTERVAL_S: Final = 2.5
"""Between two heartbeats in a shard. Four may be late before a worker counts as gone."""


class ShardRoles:
    """For each shard, whether this worker watches it. Thread-safe.

    A shard that has not told its workers yet is watched, so that no start of a worker leaves one unwatched.

    Args:
        worker: the name of this worker.
        watchers: how many workers watch each shard.
        on_change: called when this worker begins or ends to watch a shard; must not block.
    """

    def __init__(
        self, shards: int, *, worker: str, watchers: int, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._worker = worker
        self._watchers = watchers
        self._on_change = on_change
        self._is_watcher = [True] * shards
        self._workers = [1] * shards
        self._due_s = [-math.inf] * shards

    def is_watcher(self, shard: int) -> bool:
        """Whether this worker watches the shard."""
        return self._is_watcher[shard]

    @property
    def round_pause_s(self) -> float:
        """Pause between two looks at the shards that this worker does not watch."""
        return round_pause_s(max(self._workers))

    def keep(self, shard: int, note_worker: Callable[[], Collection[str]]) -> None:
        """Record this worker's heartbeat in the shard, if it is due. Called by one thread for each shard.

        Args:
            note_worker: records it, and returns the names of all workers that run; may raise an error of Redis, after
                which the next call tries again.
        """
        if time.monotonic() < self._due_s[shard]:
            return
        names = note_worker()
        self._due_s[shard] = time.monotonic() + NOTE_INTERVAL_S
        self._workers[shard] = len(names)
        is_watcher = self._worker in watchers_of(shard, names, count=self._watchers)
        if is_watcher != self._is_watcher[shard]:
            self._is_watcher[shard] = is_watcher
            self._on_change()
