"""Makes each part of the worker from the settings. Which part meets which, `wiring` says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
import structlog

from shiwu.broker.answers import AnswerStore
from shiwu.broker.connection import connect as connect_to
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.message_reader import read_canvas
from shiwu.broker.redis_errors import classify, explain, info_of
from shiwu.broker.retention import Retention, RetentionPublisher
from shiwu.contract import RETRIED, ErrorCode, Lane, WarningCode
from shiwu_worker.checkpoints.model_files import EMBEDDED
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.loaders.pool import LoaderPool
from shiwu_worker.loaders.protocol import LoaderOptions, LoadResult, LoadTask
from shiwu_worker.pipeline.batch_executor import BatchExecutor
from shiwu_worker.pipeline.heartbeat import Heartbeat, HeartbeatHooks
from shiwu_worker.pipeline.pipeline import Stages
from shiwu_worker.pipeline.settle import Settler
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.process import source_environment
from shiwu_worker.runtime.progress import Progress
from shiwu_worker.stages.batch import Batcher, Reason
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from shiwu_worker.stages.claim.notifier import LaneNotifier
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.label_warnings import EMBEDDED_MODEL

log: Any = structlog.get_logger()
SLOW_FACTOR = 10
LABEL_SET_TRIES = 4
"""Claims of a job whose label set is unknown: three times it is given back, since another worker may know the set."""
PIPELINE_CONNECTIONS = 8
"""Threads claim, commit, heartbeat, ended (which listens) and watch, the one that stops the worker, and two spare."""
NOTIFIER_CONNECTIONS = len(Lane.INTERACTIVE.keys) + len(Lane.BULK.keys)
"""Each of them waits in a blocking command for messages of one lane key."""
CELERY_CONNECTIONS = 4
"""The thread that sends callbacks, Celery's own that hears revokes, and two spare."""


def connect(settings: Settings, *, connections: int, block_s: float = 0.0) -> redis.Redis:
    """A client whose every wait is bounded. It never tries twice by itself: that is decided where the job's fate is.

    Args:
        connections: one for each thread that uses it, so that no thread ever waits for another one's command.
    """
    return connect_to(
        settings.redis_address,
        timeout_s=settings.redis_timeout_s,
        block_s=block_s,
        max_connections=connections,
        client_name=re.sub(r"[^!-~]", "-", f"shiwu-{settings.worker_name}"),  # Redis refuses other characters
    )


def connect_notifier(settings: Settings, *, block_s: float) -> redis.Redis:
    """The client of the threads that wait for messages, each in a command that blocks for `block_s`."""
    return connect(settings, connections=NOTIFIER_CONNECTIONS, block_s=block_s)


def check_redis(settings: Settings) -> None:
    """Ask Redis once, before anything is loaded.

    Raises:
        FatalError: with ExitCode.CONFIG when its answer can never become another; while it is away the worker starts.
    """
    with connect(settings, connections=1) as client:
        try:
            client.ping()
        except redis.RedisError as error:
            if info_of(error).ends_start:
                raise FatalError(ExitCode.CONFIG, f"SHIWU_REDIS_URL: {explain(error)}") from error
            log.error("redis_unavailable", where="start", code=classify(error).value, error=str(error)[:300])


def read_label_sets(settings: Settings) -> dict[str, LabelSet]:
    """The label sets of the package and of the operator, read from their files. Needs no model.

    Raises:
        FatalError: with ExitCode.CONFIG when a file is wrong or the default set is missing.
    """
    if settings.labels_dir is not None and not settings.labels_dir.is_dir():
        text = f"SHIWU_LABELS_DIR: expected a folder of label sets, got {settings.labels_dir}"
        raise FatalError(ExitCode.CONFIG, text)
    folders = [Path(__file__).parents[1] / "data/label_sets", *([settings.labels_dir] if settings.labels_dir else [])]
    try:
        sets = load_label_sets(folders)
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error
    if settings.default_labels not in sets:
        known = ", ".join(sorted(sets))
        raise FatalError(
            ExitCode.CONFIG, f"SHIWU_DEFAULT_LABELS: expected one of {known}, got {settings.default_labels!r}"
        )
    return sets


def is_embedded(settings: Settings, encoder: Any) -> bool:
    """Whether the package's own model answers."""
    return settings.model is None and encoder.info.id == EMBEDDED


def load_label_bank(settings: Settings, encoder: Any, sets: Mapping[str, LabelSet]) -> LabelBank:
    """These label sets, for this model.

    Raises:
        FatalError: with ExitCode.CONFIG when a set does not suit the model.
    """
    try:
        return LabelBank(
            sets=sets,
            default=settings.default_labels,
            encode_texts=encoder.encode_texts,
            label_tokens=encoder.label_tokens,
            usual_warnings=(EMBEDDED_MODEL,) if is_embedded(settings, encoder) else (),
            max_cached=settings.label_cache,
            has_bias=encoder.bias is not None,
            inline_head=encoder.default_head,
        )
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error


def encode_default_labels(bank: LabelBank) -> None:
    """Compute the vectors of the default labels.

    Raises:
        FatalError: with ExitCode.MODEL when the model cannot read some of them or cannot tell them apart.
    """
    encoded = bank.encoded(bank.resolve(None))
    wrong = [one for one in encoded.warnings if one.code in {WarningCode.LABELS_UNREADABLE, WarningCode.LABELS_ALIKE}]
    if wrong:
        reasons = "; ".join(one.message for one in wrong)
        raise FatalError(
            ExitCode.MODEL,
            f"SHIWU_DEFAULT_LABELS {encoded.label_set.name}: {reasons}. Check that the tokenizer's files are those of "
            "this model, or name a label set in words that the model knows",
        )


def loader_options(settings: Settings, spec: ImageSpec) -> LoaderOptions:
    """What a loader process needs to know."""
    return LoaderOptions(
        spec=spec,
        slots=settings.slot_count,
        threads=settings.loader_threads,
        s3_endpoint_url=settings.s3_endpoint_url,
        s3_region=settings.s3_region,
        s3_client=settings.s3_client,
        s3_anonymous=settings.s3_anonymous,
        s3_requester_pays=settings.s3_requester_pays,
        user_agent=settings.user_agent_text,
        max_redirects=settings.max_redirects,
        access=settings.access,
        max_bytes=settings.max_bytes,
        max_pixels=settings.max_pixels,
        max_side=settings.max_side,
        formats=settings.formats,
        exact=settings.exact_decode,
        connect_timeout_s=settings.connect_timeout_s,
        read_timeout_s=settings.read_timeout_s,
        total_timeout_s=settings.fetch_timeout_s,
        longest_pause_s=settings.retry_after_longest_s,
        memory_bytes=settings.loader_memory_mb * 1024 * 1024,
        max_frames=settings.max_frames,
        max_scans=settings.max_scans,
        cpu_s=settings.decode_cpu_s,
        sandbox=settings.sandbox,
    )


def make_loaders(
    settings: Settings,
    spec: ImageSpec,
    *,
    on_loaded: Callable[[list[LoadResult]], None],
    on_fatal: Callable[[FatalError], None],
) -> LoaderPool:
    """The loader processes, not yet started."""
    return LoaderPool(
        processes=settings.loader_count,
        spares=settings.loader_spares,
        options=loader_options(settings, spec),
        task_timeout_s=settings.load_timeout_s,
        on_loaded=on_loaded,
        on_fatal=on_fatal,
        environment=source_environment(),
    )


def make_lease_queue(settings: Settings, client: redis.Redis, token: str) -> LeaseQueue:
    """This worker's claims."""
    return LeaseQueue(
        client,
        token=token,
        lease_s=settings.lease_s,
        bulk_share=settings.bulk_share,
        lanes=settings.lanes,
        worker=settings.worker_name,
        result_ttl_s=settings.result_ttl_s,
    )


def make_answer_store(settings: Settings, client: redis.Redis, token: str) -> AnswerStore:
    """The writer of answers."""
    retention = _retention(settings)
    return AnswerStore(
        client,
        token=token,
        retention=lambda: retention,
        replicas=settings.commit_replicas,
        replicas_timeout_s=settings.replicas_timeout_s,
    )


def make_maintenance(settings: Settings, client: redis.Redis, answer_store: AnswerStore, token: str) -> Maintenance:
    """What every worker does for all."""
    return Maintenance(
        client,
        answer_store,
        name=settings.worker_name,
        token=token,
        retention=RetentionPublisher(client, _retention(settings)),
    )


def _retention(settings: Settings) -> Retention:
    return Retention(
        result_ttl_s=settings.result_ttl_s,
        done_ttl_s=max(settings.done_ttl_s, settings.result_ttl_s),
        dead_length=settings.dead_length,
        dead_age_s=settings.dead_ttl_s,
        stream_length=settings.stream_length,
    )


def make_backoff(where: str, progress: Progress) -> RedisBackoff:
    """Pauses of one thread while Redis is away; that it is away is no hang of the pipeline."""
    return RedisBackoff(where, on_wait=lambda _: progress.mark())


def make_heartbeat(
    settings: Settings,
    lease_queue: LeaseQueue,
    maintenance: Maintenance,
    hooks: HeartbeatHooks,
    progress: Progress,
    *,
    encoder: Any,
    on_fatal: Callable[[FatalError], None],
) -> Heartbeat:
    """The thread that keeps leases alive."""
    return Heartbeat(
        lease_queue,
        maintenance,
        lease_s=settings.lease_s,
        stuck_s=lambda: stuck_after_s(settings, encoder),
        progress=progress,
        hooks=hooks,
        backoff=RedisBackoff("heartbeat"),
        on_fatal=on_fatal,
    )


def stuck_after_s(settings: Settings, encoder: Any) -> float:
    """How long nothing may move while there is work. A slow device must not pass for a hung one."""
    return max(settings.stuck_s, SLOW_FACTOR * float(encoder.size_policy.slowest_s))


def make_limits(settings: Settings, encoder: Any) -> PipelineLimits:
    """What the pipeline may hold, and how patient it is."""
    usual = RetryPolicy(settings.max_attempts, settings.retry_first_s, settings.retry_longest_s)
    retries: dict[str, RetryPolicy] = dict.fromkeys(RETRIED, usual)
    retries[ErrorCode.UNKNOWN_LABEL_SET] = replace(usual, attempts=LABEL_SET_TRIES)
    retries |= {code: RetryPolicy(*policy) for code, policy in settings.retry.items()}
    return PipelineLimits(
        slots=settings.slot_count,
        wanted=lambda: settings.slots_for(encoder.size_policy.wanted),
        max_attempts=settings.max_attempts,
        zone=settings.zone,
        retries=retries,
        longest_pause_s=settings.retry_after_longest_s,
    )


def make_batcher(
    settings: Settings, encoder: Any, *, on_batch: Callable[[Reason, Sequence[Job]], None]
) -> Batcher[Job]:
    """The batcher in front of this encoder."""
    return Batcher(
        max_size=encoder.batch_sizes[-1],
        bulk_share=settings.bulk_share,
        linger_s=settings.linger_ms / 1000,
        full_size=lambda: encoder.size_policy.wanted,
        fit=encoder.size_policy.take,
        on_leave=on_batch,
    )


def make_stages(  # noqa: PLR0917 one argument for each part of the way
    settings: Settings,
    label_sets: Mapping[str, LabelSet],
    lease_queue: LeaseQueue,
    notifier: LaneNotifier,
    loaders: LoaderPool,
    encoder: Any,
    settler: Settler,
    backoff: RedisBackoff,
    *,
    canary: Callable[[], None],
    on_batch: Callable[[Reason, Sequence[Job]], None],
) -> Stages:
    """The verbs of the pipeline, with the default labels' vectors computed."""
    from shiwu_worker.stages.score.scorer import Scorer  # noqa: PLC0415 beside the encoder, which is imported late

    bank = load_label_bank(settings, encoder, label_sets)
    encode_default_labels(bank)
    if is_embedded(settings, encoder):
        log.warning("embedded_model", meaning=EMBEDDED_MODEL.message)

    def resolve(job: Job) -> LabelSet:
        return bank.resolve(job.request.labels, job.request.head) if job.request else bank.resolve(None)

    def check_callbacks(job: Job) -> None:
        settings.callback_rules.check(read_canvas(job.raw))

    def load(tickets: Sequence[tuple[int, Job]]) -> None:
        loaders.submit(
            [LoadTask(ticket=n, slot=job.slot, image=job.request.image) for n, job in tickets if job.request]
        )

    batcher = make_batcher(settings, encoder, on_batch=on_batch)
    scorer = Scorer(scale=encoder.scale, bias=encoder.bias, model=encoder.info)
    triage = BatchExecutor(
        encode_labels=bank.encoded,
        pixels=loaders.pixels,
        launch=encoder.launch,
        collect=encoder.collect,
        encode_exact=encoder.encode_exact,
        score=scorer.score,
        error_kind=encoder.error_kind,
        lower_cap=encoder.size_policy.lower,
        learn=encoder.learn,
    )
    return Stages(
        lease_queue=lease_queue,
        notifier=notifier,
        resolve=resolve,
        check_callbacks=check_callbacks,
        load=load,
        batcher=batcher,
        launch=triage.launch,
        finish=triage.finish,
        settle=settler.put,
        backoff=backoff,
        canary=canary,
    )
