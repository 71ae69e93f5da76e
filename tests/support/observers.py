"""A pipeline observer that keeps what it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from shiwu.contract import Lane
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.outcome import CommittedJob, Released
from shiwu_worker.runtime.progress import LoadReport


class RecordingObserver:
    """Implements `PipelineObserver`.

    Args:
        on_alive: called when the heartbeat reports that the worker is alive.
    """

    def __init__(self, on_alive: Callable[[], None] = lambda: None) -> None:
        self.claims: list[bool] = []
        self.batches: list[tuple[str, int]] = []
        self.labels: list[tuple[Lane | None, int]] = []
        self.committed: list[CommittedJob] = []
        self.released: list[Released] = []
        self.redis: list[bool] = []
        self.shards: list[tuple[int, bool]] = []
        self.renewed: list[int] = []
        self.reaped: list[int] = []
        self.failed_duties: list[str] = []
        self.foreign: list[int] = []
        self.saved: Counter[str] = Counter()
        self.shadow_images: Counter[str] = Counter()
        self.shadow_tags: Counter[str] = Counter()
        self.loads: list[LoadReport] = []
        self.alive_count = 0
        self._on_alive = on_alive

    def claiming(self, *, active: bool) -> None:
        """Keep a change of whether claims succeed."""
        self.claims.append(active)

    def batch_started(self, reason: str, jobs: Sequence[Job]) -> None:
        """Keep the reason and the size of a batch."""
        self.batches.append((reason, len(jobs)))

    def labels_encoded(self, lane: Lane | None, *, words: int, seconds: float) -> None:
        """Keep the lane and the number of encoded labels."""
        assert seconds >= 0
        self.labels.append((lane, words))

    def images_saved(self, by: str, count: int) -> None:
        """Keep how many were saved, and how."""
        self.saved[by] += count

    def shadow_compared(self, images: Mapping[str, int], tags: Mapping[str, int]) -> None:
        """Add the numbers of images and tags."""
        self.shadow_images.update(images)
        self.shadow_tags.update(tags)

    def jobs_committed(self, committed: Sequence[CommittedJob]) -> None:
        """Keep committed jobs."""
        self.committed += committed

    def jobs_released(self, released: Sequence[Released]) -> None:
        """Keep released jobs."""
        self.released += released

    def alive(self) -> None:
        """Count a sign of life."""
        self.alive_count += 1
        self._on_alive()

    def duty_failed(self, name: str) -> None:
        """Keep the name of a duty that failed."""
        self.failed_duties.append(name)

    def redis_available(self, *, available: bool) -> None:
        """Keep whether Redis answered."""
        self.redis.append(available)

    def shard_away(self, shard: int, *, is_away: bool) -> None:
        """Keep a change of whether a shard answers."""
        self.shards.append((shard, is_away))

    def leases_renewed(self, count: int) -> None:
        """Keep a number of renewed leases."""
        self.renewed.append(count)

    def jobs_reaped(self, count: int) -> None:
        """Keep a number of requeued jobs."""
        self.reaped.append(count)

    def foreign_moved(self, count: int) -> None:
        """Keep a number of moved values."""
        self.foreign.append(count)

    def load_measured(self, load: LoadReport) -> None:
        """Keep a load report."""
        self.loads.append(load)
