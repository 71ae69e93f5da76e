"""Groups the settings into read-only values, one for each part of the worker that needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from shiwu.broker.retention import Retention
from shiwu.contract import RETRIED, ErrorCode
from shiwu_worker.config.batches import slot_count
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.policy.limits import (
    DecodeLimits,
    FetchLimits,
    LabelLimits,
    LeaseOptions,
    LoadShares,
    S3Options,
    SandboxLimits,
)
from shiwu_worker.policy.retry import PipelineLimits, RetryPolicy

if TYPE_CHECKING:
    from shiwu_worker.config.settings import Settings

MIB: Final = 1024 * 1024
SLOW_S: Final = 3.0
MAX_FETCH_SHARE: Final = 0.9
"""Share of the time limit of a load that its fetch may take."""
LABEL_SET_ATTEMPTS: Final = 4
"""Claims of a job whose label set is unknown. It is released three times, because another worker may know the set."""


def retention(settings: Settings) -> Retention:
    """How much is kept and for how long; with shards in each of them, so that all together keep what is set."""
    shards = max(1, settings.redis_address.shards)
    return Retention(
        result_ttl_s=settings.result_ttl_s,
        done_ttl_s=max(settings.done_ttl_s, settings.result_ttl_s),
        dead_length=max(1, settings.dead_length // shards),
        dead_age_s=settings.dead_ttl_s,
        stream_length=max(1, settings.stream_length // shards),
        stream_bytes=settings.stream_mb * MIB // shards,
        dead_bytes=settings.dead_mb * MIB // shards,
        old_marks=int(settings.marks != "hashes"),
    )


def pipeline_limits(settings: Settings) -> PipelineLimits:
    """What the pipeline may hold, and when it gives a job up."""
    usual = RetryPolicy(settings.max_attempts, settings.retry_first_s, settings.retry_longest_s)
    retries: dict[str, RetryPolicy] = dict.fromkeys(RETRIED, usual)
    retries[ErrorCode.UNKNOWN_LABEL_SET] = replace(usual, attempts=LABEL_SET_ATTEMPTS)
    retries |= {code: RetryPolicy(*policy) for code, policy in settings.retry.items()}
    return PipelineLimits(
        slots=slot_count(settings),
        max_attempts=settings.max_attempts,
        retries=retries,
        longest_pause_s=settings.retry_after_longest_s,
        longest_eta_s=settings.eta_longest_s,
        zone=settings.zone,
    )


def label_limits(settings: Settings) -> LabelLimits:
    """How much of the device new labels of requests may take."""
    return LabelLimits(max_request_s=settings.label_cost_s)


def lease_options(settings: Settings) -> LeaseOptions:
    """How this worker claims jobs and keeps them."""
    return LeaseOptions(lease_s=settings.lease_s, bulk_share=settings.bulk_share, lanes=settings.lanes)


def access_rules(settings: Settings) -> AccessRules:
    """What may be reached."""
    return AccessRules(
        allow_hosts=settings.allow_hosts,
        only_hosts=settings.only_hosts,
        deny_hosts=settings.deny_hosts,
        allow_networks=settings.allow_networks,
        deny_networks=settings.deny_networks,
        nat64_prefixes=settings.nat64_prefixes,
        ports=settings.fetch_ports,
        allow_buckets=settings.allow_buckets,
        deny_buckets=settings.deny_buckets,
        allow_folders=settings.allow_folders,
        deny_folders=settings.deny_folders,
        proxy_url=settings.proxy_url.get_secret_value() if settings.proxy_url else None,
        tells_refusals=settings.tell_refusals,
    )


def callback_rules(settings: Settings) -> CallbackRules:
    """What callbacks may call."""
    queues = (settings.callback_queue, *settings.callback_queues)
    return CallbackRules(tasks=settings.callback_tasks, queues=queues, max_tasks=settings.callback_most)


def load_shares(settings: Settings) -> LoadShares:
    """How loader threads and slots are divided between lanes and sources."""
    return LoadShares(
        interactive_reserve=settings.interactive_reserve if len(set(settings.lanes)) > 1 else 0.0,
        bulk_share=settings.bulk_share,
        source_threads=settings.source_threads,
        # A body that is given up for its rate must count, however early.
        slow_s=min(SLOW_S, settings.min_rate_after_s),
    )


def fetch_limits(settings: Settings) -> FetchLimits:
    """Limits of one fetch."""
    return FetchLimits(
        max_bytes=settings.max_bytes,
        # Less than a load may take: a loader that is replaced while it fetches would count against the image.
        total_timeout_s=min(settings.fetch_timeout_s, MAX_FETCH_SHARE * settings.load_timeout_s),
        connect_timeout_s=settings.connect_timeout_s,
        read_timeout_s=settings.read_timeout_s,
        longest_pause_s=settings.retry_after_longest_s,
        max_redirects=settings.max_redirects,
        min_bytes_per_s=settings.min_rate_kb_s * 1024,
        min_rate_after_s=settings.min_rate_after_s,
    )


def s3_options(settings: Settings) -> S3Options:
    """Where the object store is, and how it is read."""
    return S3Options(
        settings.s3_endpoint_url,
        settings.s3_region,
        settings.s3_client,
        is_anonymous=settings.s3_anonymous,
        requester_pays=settings.s3_requester_pays,
        user_agent=settings.user_agent_text,
        addressing=settings.s3_addressing,
    )


def decode_limits(settings: Settings) -> DecodeLimits:
    """Limits that are checked before a pixel is decoded."""
    return DecodeLimits(
        max_pixels=settings.max_pixels,
        max_side=settings.max_side,
        formats=settings.formats,
        max_frames=settings.max_frames,
        max_scans=settings.max_scans,
    )


def sandbox_limits(settings: Settings) -> SandboxLimits:
    """Limits of the process that decodes."""
    return SandboxLimits(
        memory_bytes=settings.loader_memory_mb * MIB,
        cpu_s=settings.decode_cpu_s,
        has_filter=settings.sandbox,
    )
