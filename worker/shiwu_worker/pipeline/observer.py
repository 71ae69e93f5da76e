"""What a pipeline reports while it runs: for metrics, traces, logs and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shiwu.contract import Lane
    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.outcome import CommittedJob, Released
    from shiwu_worker.runtime.progress import LoadReport


class PipelineObserver(Protocol):
    """Receives the reports of a pipeline and its heartbeat, on the thread that makes them. Must not raise or block."""

    # -------------------------------------------------------------------------------- pipeline
    def claiming(self, *, active: bool) -> None:
        """Claims began to succeed, or ended: Redis is unavailable, or the worker stops."""

    def batch_started(self, reason: str, jobs: Sequence[Job]) -> None:
        """A batch was sent to the device: it was full, the device was free, or the worker is closing."""

    def labels_encoded(self, lane: Lane | None, *, words: int, seconds: float) -> None:
        """The device encoded labels for jobs of this lane; None: of a configured set that no job waits for."""

    def images_saved(self, by: str, count: int) -> None:
        """So many jobs were scored without encoding their images; `by` is a word of `Cache`, or
        `not_modified` if the source did not have to send the image either."""

    def shadow_compared(self, images: Mapping[str, int], tags: Mapping[str, int]) -> None:
        """So many images were tried with the shadow label set: same, changed, first, dropped. Tags: same, added,
        removed."""

    def jobs_committed(self, committed: Sequence[CommittedJob]) -> None:
        """Redis has these answers."""

    def jobs_released(self, released: Sequence[Released]) -> None:
        """Redis has these jobs back."""

    # -------------------------------------------------------------------------------- heartbeat
    def alive(self) -> None:
        """The worker makes progress, or has no work."""

    def duty_failed(self, name: str) -> None:
        """A duty of a periodic thread failed; it is tried again in the next round."""

    def redis_available(self, *, available: bool) -> None:
        """Redis answered the heartbeat, or did not. Reported at each tick."""

    def shard_away(self, shard: int, *, is_away: bool) -> None:
        """A shard does not answer this worker, or does so again."""

    def leases_renewed(self, count: int) -> None:
        """Leases of this worker were renewed."""

    def jobs_reaped(self, count: int) -> None:
        """Jobs whose leases had expired were requeued by this worker."""

    def foreign_moved(self, count: int) -> None:
        """Values of a wrong type were moved away from the keys of shiwu by this worker."""

    def load_measured(self, load: LoadReport) -> None:
        """Where the time went since the last report."""
