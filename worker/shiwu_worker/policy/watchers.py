"""Watchers: which workers do the maintenance of a shard and are notified of its messages.

Every worker computes this by itself from the names of the workers that run, so there is no election.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b
from typing import Final

WATCHERS: Final = 2
"""Workers that watch each shard: with one, a crash would leave the shard unwatched until its heartbeat is too old."""
ROUND_S: Final = 0.05
ROUND_PER_WORKER_S: Final = 0.006
"""With so much time for each worker the rounds of all workers together are at most 167 a second."""


def watchers_of(shard: int, workers: Collection[str], *, count: int = WATCHERS) -> list[str]:
    """The names of the workers that watch this shard: those with the highest hash of worker and shard.

    When a worker joins or leaves, only the shards that it watches get another watcher (rendezvous hashing).
    """
    return sorted(workers, key=lambda worker: _weight(shard, worker), reverse=True)[:count]


def _weight(shard: int, worker: str) -> tuple[bytes, str]:
    return blake2b(f"{shard}|{worker}".encode(), digest_size=8).digest(), worker


def round_pause_s(workers: int) -> float:
    """Pause between two looks of a worker at the shards that it does not watch, with so many workers in all."""
    return max(ROUND_S, workers * ROUND_PER_WORKER_S)
