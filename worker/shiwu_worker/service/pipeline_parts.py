"""Makes the pipeline, and the threads alongside it: commit, heartbeat and cancellations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, ParamSpec

from shiwu.broker.known_labels import KnownLabelStore
from shiwu.broker.queue_stats import QueueSnapshot, shared_snapshot
from shiwu.broker.worker_state import WorkerState, write_worker_state
from shiwu_worker.config import views
from shiwu_worker.config.batches import slots_for
from shiwu_worker.pipeline.admission import Admission
from shiwu_worker.pipeline.batch_executor import BatchExecutor
from shiwu_worker.pipeline.cancellations import CancellationListener
from shiwu_worker.pipeline.claimer import Claimer
from shiwu_worker.pipeline.heartbeat import Heartbeat
from shiwu_worker.pipeline.in_flight import InFlightJobs
from shiwu_worker.pipeline.label_queue import LabelQueue
from shiwu_worker.pipeline.pipeline import Pipeline, Stages
from shiwu_worker.pipeline.sharded_committer import ShardedCommitter
from shiwu_worker.pipeline.shared_images import SharedImages
from shiwu_worker.policy.limits import LABEL_SLOTS
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.service.factories import cluster_nodes
from shiwu_worker.service.label_reloader import LabelReloader
from shiwu_worker.service.label_set_recorder import LabelSetRecorder
from shiwu_worker.service.labels import check_default_labels, read_label_sets
from shiwu_worker.service.model import make_scorer
from shiwu_worker.service.shadow import ShadowOptions, ShadowScorer
from shiwu_worker.service.sharding import ShardedParts, snapshot_of_shards
from shiwu_worker.service.worker_reporter import WorkerReporter
from shiwu_worker.stages.batch import Batcher, Reason
from shiwu_worker.stages.commit import Committer
from shiwu_worker.telemetry.queue_monitor import SNAPSHOT_EVERY_S

if TYPE_CHECKING:
    from pathlib import Path

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.errors import FatalError
    from shiwu_worker.health.canary import Canary
    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.outcome import CommittedJob
    from shiwu_worker.loaders.pool import LoaderPool
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.runtime.threads import ServiceThread
    from shiwu_worker.service.factories import QueueParts
    from shiwu_worker.stages.claim.notifier import LaneNotifier
    from shiwu_worker.stages.encode.encoder import Encoder
    from shiwu_worker.stages.score.label_bank import LabelBank

P = ParamSpec("P")
MIN_STUCK_BATCHES: Final = 10
"""A worker counts as stuck no sooner than after the time of so many of its slowest batches."""


class PipelineParts:
    """What the pipeline and the threads alongside it share, and how each of them is made."""

    def __init__(
        self,
        settings: Settings,
        queues: Sequence[QueueParts],
        loaders: LoaderPool,
        encoder: Encoder,
        label_bank: LabelBank,
        *,
        notifier: LaneNotifier,
        progress: Progress,
        observer: PipelineObserver,
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self.settings, self.limits = settings, views.pipeline_limits(settings)
        self.queues, self.loaders, self.encoder = queues, loaders, encoder
        self._notifier = notifier
        self.progress, self.observer, self.on_fatal = progress, observer, on_fatal
        self.meter = LoadMeter(loader_threads=settings.loader_count * settings.loader_threads)
        self.label_bank = label_bank
        self.scorer = make_scorer(encoder, max_tags_bytes=settings.answer_tags_kb * 1024)
        self.shadow = self._make_shadow(settings.shadow) if settings.shadow else None
        self.labels = LabelQueue(
            label_bank,
            views.label_limits(settings),
            error_kind=encoder.error_kind,
            image_s=lambda: encoder.size_policy.quickest_s,
            observer=observer,
        )
        # Counted once, because the number of usable cores is read from files, and room is asked for at each claim.
        counted = settings.model_copy(update={"loaders": settings.loader_count})
        self.in_flight = InFlightJobs(
            slots=self.limits.slots,
            wanted=lambda: slots_for(counted, encoder.size_policy.wanted),
            shares=views.load_shares(settings),
            label_slots=LABEL_SLOTS,
            waiting=self.labels.waiting_jobs,
        )
        self.sharded = self._make_sharded() if len(queues) > 1 else None
        self.claims = queues[0].lease_queue if self.sharded is None else self.sharded.claims
        self.committer = self._make_committer() if self.sharded is None else self.sharded.committer

    def _make_shadow(self, name: str) -> ShadowScorer:
        settings = self.settings
        options = ShadowOptions(name, settings.shadow_of or settings.default_labels, settings.shadow_share)
        return ShadowScorer(
            options, bank=self.label_bank, scorer=self.scorer, on_compared=self.observer.shadow_compared
        )

    def _make_sharded(self) -> ShardedParts:
        return ShardedParts(
            self.queues,
            self.in_flight,
            cluster_nodes(self.settings),
            lanes=self.settings.lanes,
            worker=self.settings.worker_name,
            watchers=self.settings.watchers,
            progress=self.progress,
            observer=self.observer,
            on_fatal=self.on_fatal,
            close_timeout_s=self.commit_timeout_s,
        )

    def _make_committer(self) -> Committer:
        return Committer(
            self.queues[0].answer_store,
            worker=self.settings.worker_name,
            release=self.queues[0].lease_queue.release,
            backoff=self._backoff("commit"),
            on_fatal=self.on_fatal,
        )

    def make_pipeline(self, canary: Canary) -> Pipeline:
        """The main path; its stages stand in the order in which a job passes through them."""
        settings, encoder = self.settings, self.encoder
        shared = SharedImages(
            max_vectors=settings.vector_cache if settings.share_images else 0,
            known_images=self.loaders.known_images,
            is_on=settings.share_images,
        )
        stages = Stages(
            claimer=Claimer(
                self.claims,
                self._notifier if self.sharded is None else self.sharded.claims,
                self.in_flight,
                zone=self.limits.zone,
                backoff=self._backoff("claim"),
                progress=self.progress,
                meter=self.meter,
                observer=self.observer,
            ),
            admission=Admission(self.limits, label_bank=self.label_bank, callback_rules=views.callback_rules(settings)),
            labels=self.labels,
            loaders=self.loaders,
            shared=shared,
            batcher=make_batcher(settings, encoder, on_leave=self.observer.batch_started),
            check_canary=canary.check_if_due,
            executor=BatchExecutor(
                encoder,
                self.scorer,
                pixels=self.loaders.pixels,
                on_encoded=shared.encoded if self.shadow is None else _in_turn(shared.encoded, self.shadow.encoded),
            ),
            committer=self.committer,
        )
        return Pipeline(
            stages,
            self.in_flight,
            progress=self.progress,
            meter=self.meter,
            observer=self.observer,
            on_fatal=self.on_fatal,
        )

    def start_committer(self, pipeline: Pipeline, on_committed: Callable[[Sequence[CommittedJob]], None]) -> None:
        """Start committing; `on_committed` is called after the pipeline."""
        recorders = [LabelSetRecorder(KnownLabelStore(queue.client)).committed for queue in self.queues]
        if isinstance(self.committer, ShardedCommitter):
            self.committer.start(
                on_committed=_in_turn(pipeline.committed, on_committed),
                on_released=pipeline.released,
                on_committed_there=recorders,
            )
        else:
            self.committer.start(
                on_committed=_in_turn(pipeline.committed, *recorders, on_committed), on_released=pipeline.released
            )

    @property
    def claim_threads(self) -> list[ServiceThread]:
        """The threads that ask the shards for jobs; none on one server."""
        return [] if self.sharded is None else self.sharded.claim_threads

    @property
    def queue_threads(self) -> list[ServiceThread]:
        """The threads that claim from shards, and those that commit."""
        committer = self.committer
        threads = committer.threads if isinstance(committer, ShardedCommitter) else [committer.thread]
        return [*self.claim_threads, *threads]

    def snapshot(self) -> QueueSnapshot:
        """The sizes of all queues, at most SNAPSHOT_EVERY_S old."""
        if self.sharded is None:
            return shared_snapshot(self.queues[0].client, max_age_s=SNAPSHOT_EVERY_S)
        clients = [queue.client for queue in self.queues]
        return snapshot_of_shards(clients, max_age_s=SNAPSHOT_EVERY_S, is_away=self.sharded.health.is_away)

    def make_heartbeats(self) -> list[Heartbeat]:
        """The threads that renew the leases of the jobs in flight, one for each shard."""
        return [self._make_heartbeat(queue) for queue in self.queues]

    def _make_heartbeat(self, queue: QueueParts) -> Heartbeat:
        sharded, shard = self.sharded, queue.shard
        return Heartbeat(
            queue.lease_queue,
            queue.maintenance,
            lease_s=self.settings.lease_s,
            in_flight=self.in_flight,
            progress=self.progress,
            meter=self.meter,
            stuck_s=self.stuck_s,
            on_quarantine=self._notifier.notify if sharded is None else partial(sharded.claims.note_messages, shard),
            observer=self.observer,
            backoff=RedisBackoff("heartbeat") if sharded is None else sharded.heartbeat_backoff(shard),
            on_fatal=self.on_fatal,
            shard=None if sharded is None else sharded.duties(shard),
            publish=WorkerReporter(
                partial(write_worker_state, queue.client, self.settings.worker_name),
                self._about(),
                labels=lambda: self.label_bank.resolve(None).info,
                meter=self.meter,
                in_flight=self.in_flight,
                loaders=self.loaders,
                encoder=self.encoder,
            ).publish,
        )

    def _about(self) -> WorkerState:
        """What does not change while the worker runs."""
        model = self.encoder.info
        return WorkerState(
            version=version("shiwu"),
            slots=self.limits.slots,
            device=model.device,
            model=model.id,
            revision=model.revision,
            dtype=model.dtype,
        )

    def make_cancellations(self) -> list[CancellationListener]:
        """The threads that receive the ids of jobs that another process answered, one for each shard."""
        return [
            CancellationListener(
                queue.client,
                on_answered_elsewhere=partial(self.in_flight.mark_answered_elsewhere, shard=queue.shard),
                on_fatal=self.on_fatal,
                shard=queue.shard,
            )
            for queue in self.queues
        ]

    def make_label_reloader(self, folder: Path, *, on_end: Callable[[bool], None]) -> LabelReloader:
        """The thread that reads label sets again when their files change."""
        return LabelReloader(
            self.label_bank,
            folder=folder,
            poll_s=self.settings.labels_poll_s,
            read=partial(read_label_sets, self.settings),
            encode_ahead=self.labels.encode_ahead,
            check_default=check_default_labels,
            on_end=on_end,
        )

    @property
    def commit_timeout_s(self) -> float:
        """How long the last commit may take when the worker stops: one try that fails, and another."""
        return 2 * self.settings.redis_timeout_s

    def stuck_s(self) -> float:
        """How long the worker may make no progress while there is work. A slow device does not count as stuck."""
        return max(self.settings.stuck_s, MIN_STUCK_BATCHES * self.encoder.size_policy.slowest_s)

    def _backoff(self, where: str) -> RedisBackoff:
        """The pauses of one thread. A worker that waits for Redis is not stuck, so each pause counts as progress."""
        return RedisBackoff(where, on_wait=lambda _: self.progress.mark())


def _in_turn(*subscribers: Callable[P, None]) -> Callable[P, None]:
    """Calls the subscribers in this order."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        for subscriber in subscribers:
            subscriber(*args, **kwargs)

    return call


def make_batcher(
    settings: Settings, encoder: Encoder, *, on_leave: Callable[[Reason, Sequence[Job]], None]
) -> Batcher[Job]:
    """The batcher in front of this encoder."""
    return Batcher(
        max_size=encoder.batch_sizes[-1],
        bulk_share=settings.bulk_share,
        linger_s=settings.linger_ms / 1000,
        full_size=lambda: encoder.size_policy.wanted,
        brief_size=lambda: encoder.size_policy.brief,
        fit=encoder.size_policy.take,
        on_leave=on_leave,
    )
