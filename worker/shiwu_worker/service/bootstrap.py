"""Builds every part, sink first, on one ExitStack; closing then follows the data. Only it knows all rooms."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis
import structlog

from shiwu.broker.known_labels import KnownLabelStore
from shiwu_worker.checkpoints.model_files import model_folder, model_revision
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import apply_tuning
from shiwu_worker.errors import FatalError
from shiwu_worker.jobs.job import Release
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.loaders.pool import LoaderPool
from shiwu_worker.loaders.protocol import LoadResult
from shiwu_worker.pipeline.cancellations import CancellationListener
from shiwu_worker.pipeline.pipeline import Pipeline
from shiwu_worker.pipeline.settle import Settler
from shiwu_worker.runtime.garbage import freeze_started
from shiwu_worker.runtime.malloc import use_one_arena
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.service.factories import (
    PIPELINE_CONNECTIONS,
    check_redis,
    connect,
    connect_notifier,
    make_answer_store,
    make_backoff,
    make_heartbeat,
    make_lease_queue,
    make_limits,
    make_loaders,
    make_maintenance,
    make_stages,
    read_label_sets,
)
from shiwu_worker.service.label_notes import LabelNoter
from shiwu_worker.service.model import load_encoder, make_canary
from shiwu_worker.service.observability import Observability
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from shiwu_worker.stages.claim.notifier import LaneNotifier
from shiwu_worker.stages.commit import Committer
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.telemetry.logs import job_logger

log: Any = structlog.get_logger()
NOTIFIER_BLOCK_S = 5.0
START_S = 60.0
LOADERS_STOP_S = 5.0
T = TypeVar("T")


class WorkerService:
    """A running worker: claims from `open_service` until `stop`."""

    def __init__(self, *, pipeline: Pipeline, stop: Callable[[float], None], observability: Observability) -> None:
        self._pipeline = pipeline
        self._stop = stop
        self._observability = observability

    def receiving_revokes(self, *, active: bool) -> None:
        """Celery's half hears what is broadcast to workers, or does so no longer."""
        self._observability.receiving_revokes(active=active)

    def stop(self, *, grace_s: float) -> None:
        """Drain within the grace time and give back what is left. The first call counts."""
        self._stop(grace_s)

    def hurry(self) -> None:
        """Give back at once; for a second signal."""
        self._pipeline.hurry()


@contextmanager
def open_service(
    settings: Settings,
    *,
    on_fatal: Callable[[FatalError], None],
    on_answered: Callable[[Sequence[CommittedJob]], None] = lambda _: None,
    waits_for_revokes: bool = False,
) -> Iterator[WorkerService]:
    """Load the model, start all parts, claim; on leaving, stop in the direction of the data.

    Args:
        on_answered: told each answer that was written; must not raise and not block.
        waits_for_revokes: the worker is ready only when `WorkerService.receiving_revokes` was told so, too.

    Raises:
        FatalError: when a part can't start. Nothing has been claimed then.
    """
    use_one_arena()  # again: Celery's own command may have started this process
    progress = Progress()
    observability = Observability(settings, progress, waits_for_revokes=waits_for_revokes)
    with ExitStack() as stack:
        observability.open(stack)
        check_redis(settings)
        # Before the model: a wrong file is told within a second.
        label_sets = read_label_sets(settings)
        folder = model_folder(settings.model)
        settings = apply_tuning(settings, lambda: model_revision(folder))
        yield _build(
            *(stack, settings, folder, observability, progress),
            label_sets=label_sets,
            on_fatal=on_fatal,
            on_answered=on_answered,
        )


def _build(
    stack: ExitStack,
    settings: Settings,
    folder: Path,
    observability: Observability,
    progress: Progress,
    *,
    label_sets: Mapping[str, LabelSet],
    on_fatal: Callable[[FatalError], None],
    on_answered: Callable[[Sequence[CommittedJob]], None],
) -> WorkerService:
    """Make and start the parts, each with its end on the stack."""
    token = _new_token(settings)
    meter = LoadMeter(loader_threads=settings.loader_count * settings.loader_threads)
    client = stack.enter_context(connect(settings, connections=PIPELINE_CONNECTIONS))
    notifier = _make_notifier(stack, settings)
    lease_queue = make_lease_queue(settings, client, token)
    answer_store = make_answer_store(settings, client, token)
    spec = read_image_spec(folder)
    # Parts that answer upwards are bound late: the pipeline is made last.
    loaders = _start_loaders(stack, settings, spec, on_loaded=lambda done: pipeline.loaded(done), on_fatal=on_fatal)
    settler = Settler(
        Committer(answer_store, worker=settings.worker_name),
        lease_queue,
        backoff=make_backoff("commit", progress),
        on_settled=_each(lambda jobs: pipeline.settled(jobs), observability.remove),
        on_answered=_each(
            *_job_log(settings), observability.answered, LabelNoter(KnownLabelStore(client)).answered, on_answered
        ),
        on_fatal=on_fatal,
    )
    encoder = load_encoder(settings, folder, spec)
    loaders.wait_ready(START_S)
    canary = make_canary(settings, encoder, spec, on_wrong=observability.wrong)
    canary.check_if_due()
    stages = make_stages(
        *(settings, label_sets, lease_queue, notifier, loaders, encoder, settler, make_backoff("claim", progress)),
        canary=canary.check_if_due,
        on_batch=observability.batch_left,
    )
    pipeline = Pipeline(
        stages,
        make_limits(settings, encoder),
        progress=progress,
        meter=meter,
        on_fatal=on_fatal,
        on_claiming=lambda active: observability.claiming(active=active),
    )
    hooks = observability.hooks(pipeline, meter, suspects=notifier.ring)
    maintenance = make_maintenance(settings, client, answer_store, token)
    heartbeat = make_heartbeat(settings, lease_queue, maintenance, hooks, progress, encoder=encoder, on_fatal=on_fatal)
    stack.callback(heartbeat.close)
    ended = CancellationListener(client, on_ended=pipeline.ended, on_fatal=on_fatal)
    stack.callback(ended.close)
    observability.watch(stack, client, encoder, loaders)
    once = _Once(partial(_stop, settings, observability, lease_queue, pipeline, settler))
    stack.callback(once, settings.grace_s)
    _start(stack, settler, notifier, heartbeat, ended, pipeline)
    observability.started(pipeline, encoder, loaders)
    return WorkerService(pipeline=pipeline, stop=once, observability=observability)


def _make_notifier(stack: ExitStack, settings: Settings) -> LaneNotifier:
    client = stack.enter_context(connect_notifier(settings, block_s=NOTIFIER_BLOCK_S))
    return LaneNotifier(client, block_s=NOTIFIER_BLOCK_S, lanes=settings.lanes)


def _start_loaders(
    stack: ExitStack,
    settings: Settings,
    spec: ImageSpec,
    *,
    on_loaded: Callable[[list[LoadResult]], None],
    on_fatal: Callable[[FatalError], None],
) -> LoaderPool:
    """The loader processes, which import their libraries while this process imports the model's."""
    loaders = make_loaders(settings, spec, on_loaded=on_loaded, on_fatal=on_fatal)
    stack.callback(loaders.close, LOADERS_STOP_S)
    loaders.start()
    return loaders


def _start(stack: ExitStack, *parts: Any) -> None:
    freeze_started(stack)
    for part in parts:
        part.start()


def _new_token(settings: Settings) -> str:
    """The name lets an operator see who holds a claim; '|' parts the fields of a claim's record."""
    return f"{settings.worker_name.replace('|', '-')}.{secrets.token_hex(4)}"


def _stop(  # noqa: PLR0917 what it stops, in order
    settings: Settings,
    observability: Observability,
    lease_queue: LeaseQueue,
    pipeline: Pipeline,
    settler: Settler,
    grace_s: float,
) -> None:
    """Intake first, leases last: whoever holds a job keeps its lease until it is answered or given back."""
    observability.stopping()
    give_back(lease_queue, pipeline.stop(grace_s=grace_s))
    settler.close(timeout_s=settings.redis_timeout_s * 2)


def _job_log(settings: Settings) -> Iterator[Callable[[Sequence[CommittedJob]], None]]:
    """One log line for each answer, where the level asks for it."""
    log_job = job_logger(level=settings.log_level)
    if log_job is not None:

        def tell(settled: Sequence[CommittedJob]) -> None:
            for one in settled:
                log_job(one.entry.answer, one.commit_s, not one.is_first)

        yield tell


def _each(*told: Callable[[T], None]) -> Callable[[T], None]:
    """All of them, in this order."""

    def tell(what: T) -> None:
        for each in told:
            each(what)

    return tell


def give_back(lease_queue: LeaseQueue, left: Sequence[Release]) -> None:
    """Return jobs to the front of their lanes; where Redis is away, their leases will."""
    try:
        if left:
            log.info("jobs_released", jobs=lease_queue.release(left))
    except redis.RedisError as error:
        log.error("release_failed", jobs=len(left), error=str(error)[:300])


class _Once:
    """A stop that two paths may ask for and one call carries out."""

    def __init__(self, stop: Callable[[float], None]) -> None:
        self._stop: Callable[[float], None] | None = stop

    def __call__(self, grace_s: float) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            stop(grace_s)
