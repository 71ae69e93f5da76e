"""Composition root: builds every part of a worker, starts them, and stops them in the direction of the data.

Parts are built in the order of their needs, each with its end on one ExitStack. No other module knows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import redis
import structlog

from shiwu_worker.checkpoints.model_files import model_folder, model_revision
from shiwu_worker.config.tuned import apply_tuning
from shiwu_worker.runtime.blas import use_one_blas_thread
from shiwu_worker.runtime.garbage import freeze_started
from shiwu_worker.runtime.malloc import set_up_malloc
from shiwu_worker.runtime.progress import Progress
from shiwu_worker.runtime.threads import ServiceThread
from shiwu_worker.service.factories import check_redis, open_notifier, open_queues, start_loaders
from shiwu_worker.service.labels import open_label_bank, read_label_sets
from shiwu_worker.service.marks import choose_marks
from shiwu_worker.service.model import load_encoder, make_canary
from shiwu_worker.service.observability import Observability
from shiwu_worker.service.pipeline_parts import PipelineParts
from shiwu_worker.stages.decode.image_spec import read_image_spec

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.errors import FatalError
    from shiwu_worker.jobs.job import Release
    from shiwu_worker.jobs.outcome import CommittedJob
    from shiwu_worker.pipeline.cancellations import CancellationListener
    from shiwu_worker.pipeline.heartbeat import Heartbeat
    from shiwu_worker.pipeline.pipeline import Pipeline
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue
    from shiwu_worker.stages.claim.sharded_claims import ShardedClaims

log: FilteringBoundLogger = structlog.get_logger()
LOADERS_READY_TIMEOUT_S: Final = 60.0
LABELS_CLOSE_S: Final = 2.0


@contextmanager
def open_service(
    settings: Settings,
    *,
    on_fatal: Callable[[FatalError], None],
    on_committed: Callable[[Sequence[CommittedJob]], None] = lambda _: None,
    is_waiting_for_revokes: bool = False,
) -> Iterator[WorkerService]:
    """Load the model, start all parts, and claim; stop them in the direction of the data on leaving.

    Args:
        on_fatal: called, from any thread, when the process cannot go on.
        on_committed: gets the jobs whose answers Redis has; must not raise or block.
        is_waiting_for_revokes: the worker is ready only once `WorkerService.receiving_revokes` reported broadcasts.

    Raises:
        FatalError: when a part cannot start. No job has been claimed then.
    """
    set_up_malloc()  # here too, because Celery's own command may have started this process
    use_one_blas_thread()
    progress = Progress()
    observer = Observability(settings, progress, is_waiting_for_revokes=is_waiting_for_revokes)
    with ExitStack() as stack:
        observer.open(stack)
        check_redis(settings)
        label_sets = read_label_sets(settings)  # before the model, so that a wrong file is reported within a second
        folder = model_folder(settings.model)
        settings = apply_tuning(settings, lambda: model_revision(folder))
        settings = choose_marks(settings)
        queues, notifier = open_queues(stack, settings), open_notifier(stack, settings)
        spec = read_image_spec(folder)
        loaders = start_loaders(stack, settings, spec, on_fatal=on_fatal)
        encoder = load_encoder(settings, folder, spec)
        loaders.wait_ready(LOADERS_READY_TIMEOUT_S)
        canary = make_canary(settings, encoder, on_wrong=observer.canary_failed)
        canary.check_if_due()
        label_bank = open_label_bank(settings, encoder, label_sets)
        parts = PipelineParts(
            settings,
            queues,
            loaders,
            encoder,
            label_bank,
            notifier=notifier,
            progress=progress,
            observer=observer,
            on_fatal=on_fatal,
        )
        service = WorkerService(parts, parts.make_pipeline(canary), observer)
        for listener in service.listeners:
            stack.callback(listener.close)
        stack.callback(service.close_label_threads)
        if len(queues) > 1:
            observer.shards(len(queues))
        observer.watch(stack, parts.snapshot, encoder, loaders, words_waiting=parts.labels.words_waiting)
        stack.callback(service.stop, grace_s=settings.grace_s)
        freeze_started(stack)
        service.start(on_committed)
        yield service


class WorkerService:
    """A running worker: it claims from `open_service` until `stop`."""

    def __init__(self, parts: PipelineParts, pipeline: Pipeline, observer: Observability) -> None:
        self._parts = parts
        self._pipeline = pipeline
        self._observer = observer
        self.listeners: list[Heartbeat | CancellationListener] = [*parts.make_heartbeats(), *parts.make_cancellations()]
        """Threads alongside the pipeline, which end last."""
        folder = parts.settings.labels_dir
        self._reloader = None if folder is None else parts.make_label_reloader(folder, on_end=self._reloaded)
        self._label_threads = [each.thread for each in (self._reloader, parts.shadow) if each is not None]
        self._reloaded(None)
        self._is_stopped = False

    def start(self, on_committed: Callable[[Sequence[CommittedJob]], None]) -> None:
        """Start the threads, and the one that claims last."""
        parts, pipeline = self._parts, self._pipeline
        parts.start_committer(pipeline, on_committed)
        for listener in self.listeners:
            listener.start()
        for thread in parts.claim_threads:
            thread.start()
        pipeline.start()
        self._observer.started(
            threads=(*pipeline.threads, *parts.queue_threads, *(listener.thread for listener in self.listeners)),
            in_flight=parts.in_flight,
            encode_age_s=pipeline.encode_age_s,
            loaders=parts.loaders,
            stuck_s=parts.stuck_s,
        )
        if parts.shadow is not None:
            parts.labels.encode_ahead(parts.label_bank.sets[parts.shadow.name], lambda _: None)
        for thread in self._label_threads:
            thread.start()

    def reload_labels(self) -> None:
        """Read the files of label sets again, soon. May be called from a signal handler."""
        if self._reloader is not None:
            self._reloader.ask()

    def close_label_threads(self) -> None:
        """Read no further files, and report what the shadow has compared."""
        for thread in self._label_threads:
            thread.close(LABELS_CLOSE_S)

    def _reloaded(self, is_done: bool | None) -> None:
        digests = {name: label_set.info.digest for name, label_set in self._parts.label_bank.sets.items()}
        self._observer.label_sets(digests, is_done=is_done)

    def stop(self, *, grace_s: float) -> None:
        """Drain within the grace time, then release what is left. Only the first call has an effect."""
        if not self._is_stopped:
            self._is_stopped = True
            self._observer.stopping()
            until_s = time.monotonic() + grace_s + self._parts.commit_timeout_s
            # Claims end first and leases last, so every job keeps its lease until it is answered or released.
            left = self._pipeline.stop(grace_s=grace_s)
            # On a thread of its own: a slow Redis would otherwise take the time of the last answers.
            releaser = ServiceThread("release", partial(release_left, self._parts.claims, left), on_fatal=None)
            releaser.start()
            self._parts.committer.close(timeout_s=max(0.0, until_s - time.monotonic()))
            releaser.join(max(0.0, until_s - time.monotonic()))
            for thread in (*self._label_threads, *(listener.thread for listener in self.listeners)):
                thread.ask_to_end()  # all at the same time; their `close` waits

    def hurry(self) -> None:
        """End the grace time of a running `stop`, for a second signal."""
        self._pipeline.hurry()

    def receiving_revokes(self, *, active: bool) -> None:
        """Report whether Celery's broadcasts to workers are received."""
        self._observer.receiving_revokes(active=active)


def release_left(claims: LeaseQueue | ShardedClaims, releases: Sequence[Release]) -> None:
    """Release jobs to the front of their lanes, and what the last claim brought. Without Redis their leases expire."""
    try:
        released = claims.release(releases)
        released += claims.end()
        if released:
            log.info("jobs_released", jobs=released)
    except redis.RedisError as error:
        log.error("release_failed", jobs=len(releases), error=str(error)[:300])
