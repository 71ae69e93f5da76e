"""Metrics that rules and dashboard may name, with their labels."""

from __future__ import annotations

METRICS: dict[str, frozenset[str]] = {
    "shiwu_jobs_total": frozenset({"lane", "status", "code"}),
    "shiwu_queue_waiting": frozenset({"lane"}),
    "shiwu_queue_claimed": frozenset({"lane"}),
    "shiwu_queue_oldest_age_seconds": frozenset({"lane"}),
    "shiwu_queue_backlog_seconds": frozenset({"lane"}),
    "shiwu_batches_total": frozenset({"reason"}),
    "shiwu_retries_total": frozenset({"code"}),
    "shiwu_limit_ratio": frozenset({"what"}),
    "shiwu_duty_failures_total": frozenset({"duty"}),
    "shiwu_shadow_images_total": frozenset({"result"}),
    "shiwu_shadow_tags_total": frozenset({"change"}),
    "shiwu_hooks_answers_total": frozenset({"outcome"}),
    "shiwu_hooks_tries_total": frozenset({"endpoint", "outcome"}),
    "shiwu_hooks_pending": frozenset({"endpoint"}),
    "shiwu_hooks_endpoint_failures": frozenset({"endpoint"}),
    "shiwu_hooks_endpoint_disabled": frozenset({"endpoint"}),
    "shiwu_watch_events_total": frozenset({"outcome"}),
    "shiwu_watch_requests_refused_total": frozenset({"status"}),
    "shiwu_model_info": frozenset({"model", "revision", "dtype", "device"}),
}
"""Metric → its labels."""
BARE = [
    "shiwu_queue_delayed",
    "shiwu_dead_letters",
    "shiwu_leases_renewed_total",
    "shiwu_leases_reaped_total",
    "shiwu_answers_discarded_total",
    "shiwu_loader_restarts_total",
    "shiwu_gpu_memory_used_bytes",
    "shiwu_gpu_memory_total_bytes",
    "shiwu_gpu_utilisation_ratio",
    "shiwu_worker_ready",
    "shiwu_progress_age_seconds",
    "shiwu_redis_up",
    "shiwu_workers",
    "shiwu_workers_expected",
    "shiwu_sweep_last_round_timestamp_seconds",
    "shiwu_results_dropped_total",
    "shiwu_hooks_in_flight",
    "shiwu_hooks_dead",
    "shiwu_hooks_reading_paused",
    "shiwu_watch_messages_total",
    "shiwu_watch_waiting",
    "shiwu_watch_source_up",
    "shiwu_watch_last_portion_timestamp_seconds",
]
"""Metrics without labels."""
OF_THE_SWEEP = {
    "shiwu_workers",
    "shiwu_workers_expected",
    "shiwu_sweep_last_round_timestamp_seconds",
    "shiwu_results_dropped_total",
}
"""Metrics that a worker does not export."""
HISTOGRAMS = {
    "shiwu_stage_seconds": {"stage"},
    "shiwu_queue_wait_seconds": {"lane"},
    "shiwu_answer_seconds": {"lane"},
    "shiwu_batch_size": set(),
    "shiwu_hooks_try_seconds": {"endpoint"},
    "shiwu_watch_portion_seconds": set(),
}
"""Histogram → its labels."""
