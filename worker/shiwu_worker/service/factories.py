"""Makes the parts of a worker that use Redis, and the loader pool, from the settings."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import redis
import structlog

from shiwu.broker.answers import AnswerStore
from shiwu.broker.connection import connect as connect_to
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.migration import check_names
from shiwu.broker.redis_errors import classify, explain, info_of
from shiwu.broker.retention import RetentionPublisher
from shiwu.broker.sharding import ClusterNodes, PoolOptions, ShardRedis, keep_shard_count, open_nodes, open_shards
from shiwu_worker.config import views
from shiwu_worker.config.batches import slot_count
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.pool import LoaderPool
from shiwu_worker.loaders.protocol import LoaderOptions
from shiwu_worker.runtime.process import source_environment
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from shiwu_worker.stages.claim.notifier import LaneNotifier

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.stages.decode.image_spec import ImageSpec

log: FilteringBoundLogger = structlog.get_logger()
PIPELINE_CONNECTIONS: Final = 8
"""One for each of claim, commit, heartbeat, cancellations, queue monitor and the thread that stops; two spare."""
CELERY_CONNECTIONS: Final = 4
"""One for the callbacks thread, one for Celery's own thread, which receives revokes; two spare."""
LOADERS_CLOSE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class QueueParts:
    """The parts of a worker that use Redis. They share one token."""

    client: redis.Redis
    lease_queue: LeaseQueue
    answer_store: AnswerStore
    maintenance: Maintenance
    shard: int = 0
    """Index of the shard that they use; 0 on one server."""


def connect(settings: Settings, *, connections: int, has_pushes: bool = False) -> redis.Redis:
    """A client whose every wait is bounded. It never retries by itself: the part that uses it decides about retries.

    Args:
        connections: one for each thread that uses the client, so that no thread waits for another thread's command.
        has_pushes: use RESP3, by which the server can notify a connection.
    """
    return connect_to(
        settings.redis_address,
        timeout_s=settings.redis_timeout_s,
        has_pushes=has_pushes,
        max_connections=connections,
        client_name=_client_name(settings),
    )


def connect_shards(
    settings: Settings, *, connections: int, has_pushes: bool = False, retries: int = 0
) -> tuple[ShardRedis, ...]:
    """A client of each shard, with the limits of `connect`; one where the URL names one server.

    Args:
        retries: how often a command is repeated after a lost connection. A node that has lost the slot of a shard
            refuses one command of each connection.
    """
    limits = PoolOptions(
        timeout_s=settings.redis_timeout_s,
        retries=retries,
        has_pushes=has_pushes,
        max_connections=connections,
        client_name=_client_name(settings),
    )
    return open_shards(settings.redis_address, limits)


def _client_name(settings: Settings) -> str:
    """The name by which an operator finds the connections of this worker. Redis refuses other characters."""
    return re.sub(r"[^!-~]", "-", f"shiwu-{settings.worker_name}")


def check_redis(settings: Settings) -> None:
    """Ask Redis once, before anything is loaded. While Redis is unavailable the worker starts nevertheless.

    With shards, the number of shards is compared with that of the cluster, and each shard is asked.

    Raises:
        FatalError: with ExitCode.CONFIG when Redis refuses the settings, or has jobs under names of an earlier version.
    """
    clients = connect_shards(settings, connections=1)
    try:
        with ThreadPoolExecutor(len(clients), thread_name_prefix="start") as pool:
            for error in pool.map(partial(_ask_once, settings), clients):
                if error is None:
                    continue
                if info_of(error).ends_start:
                    raise FatalError(ExitCode.CONFIG, f"SHIWU_REDIS_URL: {explain(error)}") from error
                log.error("redis_unavailable", where="start", code=classify(error).value, error=str(error)[:300])
    finally:
        for client in clients:
            client.close()


def _ask_once(settings: Settings, client: ShardRedis) -> redis.RedisError | None:
    """The error of a server that does not answer, refuses the settings, or has jobs under names of another version."""
    try:
        client.ping()
        check_names(client)
        if client.shard.index == 0:
            if shards := settings.redis_address.shards:
                keep_shard_count(client, shards=shards)
            warn_of_memory(settings, client)
    except redis.RedisError as error:
        return error
    return None


def warn_of_memory(settings: Settings, client: redis.Redis) -> None:
    """Log what the memory settings of Redis put at risk; nothing where INFO is refused or Redis is unavailable."""
    with suppress(redis.RedisError):
        info: Any = client.info("memory")
        for text in memory_warnings(settings, info):
            log.warning("redis_memory", text=text)


def memory_warnings(settings: Settings, info: Mapping[str, Any]) -> list[str]:
    """What the memory settings in a reply of INFO put at risk."""
    warnings = []
    policy, most_bytes = str(info.get("maxmemory_policy", "unknown")), int(info.get("maxmemory") or 0)
    if policy != "noeviction":
        what = "waiting jobs" if policy.startswith("allkeys") else "answers and done marks"
        warnings.append(f"maxmemory-policy {policy} deletes {what} when the memory is full; expected noeviction")
    budgets_mb = settings.stream_mb + settings.dead_mb
    if not most_bytes:
        warnings.append("maxmemory is not set, so Redis grows until the kernel ends it; set it, with noeviction")
    elif most_bytes <= budgets_mb * views.MIB:
        warnings.append(
            f"maxmemory is {most_bytes // views.MIB} MiB, less than SHIWU_STREAM_MB + SHIWU_DEAD_MB = {budgets_mb} MiB"
        )
    return warnings


def open_queues(stack: ExitStack, settings: Settings) -> list[QueueParts]:
    """Make the parts that use Redis, those of each shard. Their connections are closed with the stack."""
    # The worker's name lets an operator see who holds a claim; "|" separates the fields of a claim's record.
    token = f"{settings.worker_name.replace('|', '-')}.{secrets.token_hex(4)}"
    clients = connect_shards(settings, connections=PIPELINE_CONNECTIONS)
    for client in clients:
        stack.enter_context(client)
    return [_queue_parts(settings, client, token=token, shard=shard) for shard, client in enumerate(clients)]


def open_notifier(stack: ExitStack, settings: Settings) -> LaneNotifier:
    """The notifier of one server, or of a single shard. Its connection is closed with the stack."""
    client, *_ = connect_shards(settings, connections=1, has_pushes=True)
    return LaneNotifier(stack.enter_context(client), lanes=settings.lanes)


def cluster_nodes(settings: Settings) -> ClusterNodes:
    """The nodes of the cluster. Nothing is sent yet."""
    limits = PoolOptions(timeout_s=settings.redis_timeout_s, client_name=_client_name(settings))
    return open_nodes(settings.redis_address, limits)


def _queue_parts(settings: Settings, client: redis.Redis, *, token: str, shard: int) -> QueueParts:
    answer_store = make_answer_store(settings, client, token)
    return QueueParts(
        client=client,
        lease_queue=LeaseQueue(
            client,
            views.lease_options(settings),
            token=token,
            worker=settings.worker_name,
            result_ttl_s=settings.result_ttl_s,
            shard=shard,
        ),
        answer_store=answer_store,
        maintenance=Maintenance(
            client,
            answer_store,
            name=settings.worker_name,
            token=token,
            retention=RetentionPublisher(client, views.retention(settings)),
            zone=settings.zone,
        ),
        shard=shard,
    )


def make_answer_store(settings: Settings, client: redis.Redis, token: str) -> AnswerStore:
    """The writer of answers."""
    retention = views.retention(settings)
    return AnswerStore(
        client,
        token=token,
        retention=lambda: retention,
        replicas=settings.commit_replicas,
        replicas_timeout_s=settings.replicas_timeout_s,
    )


def loader_options(settings: Settings, spec: ImageSpec) -> LoaderOptions:
    """What a loader process needs to know."""
    return LoaderOptions(
        spec=spec,
        slots=slot_count(settings),
        threads=settings.loader_threads,
        access=views.access_rules(settings),
        fetch=views.fetch_limits(settings),
        s3=views.s3_options(settings),
        user_agent=settings.user_agent_text,
        decode=views.decode_limits(settings),
        is_exact=settings.exact_decode,
        sandbox=views.sandbox_limits(settings),
        # Without kept vectors an image is known only for as long as it is in flight, so each is decoded.
        known_images=settings.vector_cache if settings.share_images else 0,
    )


def start_loaders(
    stack: ExitStack, settings: Settings, spec: ImageSpec, *, on_fatal: Callable[[FatalError], None]
) -> LoaderPool:
    """Start the loader processes; they end with the stack. Their imports run while this process loads the model."""
    loaders = LoaderPool(
        processes=settings.loader_count,
        spares=settings.loader_spares,
        options=loader_options(settings, spec),
        task_timeout_s=settings.load_timeout_s,
        on_fatal=on_fatal,
        environment=source_environment(),
        shares=views.load_shares(settings),
    )
    stack.callback(loaders.close, LOADERS_CLOSE_TIMEOUT_S)
    loaders.start()
    return loaders
