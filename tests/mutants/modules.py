"""Which modules hold promises, and which tests belong to each: those that must notice a fault in it.

A promise of a whole worker is also held by tests that start one. They take too long to run for every fault.
"""

from __future__ import annotations

from typing import Final

CLIENT: Final = (
    "tests/unit/client/test_argument_bounds.py",
    "tests/unit/client/test_arguments.py",
    "tests/unit/client/test_client_arguments.py",
    "tests/integration/test_client.py",
)
AIO: Final = ("tests/unit/aio", "tests/integration/test_aio.py", "tests/integration/test_waiting.py")
MESSAGES: Final = (
    "tests/unit/broker/test_message_body.py",
    "tests/unit/broker/test_message_canvas.py",
    "tests/unit/broker/test_message_reader.py",
)
CONTRACT: Final = ("tests/unit/contract", *MESSAGES)
PIPELINE: Final = ("tests/unit/pipeline", "tests/integration/test_pipeline.py")
QUEUE: Final = (
    "tests/integration/test_claim.py",
    "tests/integration/test_generations.py",
    "tests/integration/test_history.py",
)
CONSUMERS: Final = ("tests/integration/test_stream_consumers.py", "tests/compat/test_next_version.py")

TESTS: Final[dict[str, tuple[str, ...]]] = {
    "worker/shiwu_worker/pipeline/admission.py": PIPELINE,
    "worker/shiwu_worker/pipeline/batch_executor.py": (
        "tests/unit/pipeline/test_batch_executor.py",
        "tests/unit/pipeline/test_pipeline.py",
    ),
    "worker/shiwu_worker/pipeline/cancellations.py": (
        "tests/unit/pipeline/test_cancellations.py",
        "tests/integration/test_cancellations.py",
    ),
    "worker/shiwu_worker/pipeline/claimer.py": PIPELINE,
    "worker/shiwu_worker/pipeline/heartbeat.py": (
        "tests/unit/pipeline/test_heartbeat.py",
        "tests/integration/test_heartbeat.py",
    ),
    "worker/shiwu_worker/pipeline/in_flight.py": PIPELINE,
    "worker/shiwu_worker/pipeline/label_queue.py": (
        "tests/unit/pipeline/test_label_queue.py",
        "tests/unit/pipeline/test_label_queue_lanes.py",
        "tests/unit/pipeline/test_pipeline.py",
    ),
    "worker/shiwu_worker/pipeline/load_results.py": PIPELINE,
    "worker/shiwu_worker/pipeline/pipeline.py": PIPELINE,
    "worker/shiwu_worker/stages/batch.py": ("tests/unit/stages/test_batch.py", *PIPELINE),
    "worker/shiwu_worker/stages/commit.py": (
        "tests/unit/stages/test_commit.py",
        *PIPELINE,
        "tests/integration/test_history.py",
        "tests/integration/test_dead_letters.py",
        "tests/integration/test_message_ids.py",
    ),
    "worker/shiwu_worker/stages/claim/lease_queue.py": (
        "tests/unit/stages/test_lease_queue.py",
        *QUEUE,
        "tests/integration/test_late_claims.py",
        "tests/integration/test_pipeline.py",
    ),
    "worker/shiwu_worker/stages/claim/notifier.py": (
        "tests/integration/test_lane_notifier.py",
        "tests/integration/test_pipeline.py",
    ),
    "worker/shiwu_worker/stages/score/label_bank.py": (
        "tests/unit/stages/test_label_bank.py",
        "tests/unit/pipeline/test_label_queue.py",
        "tests/unit/pipeline/test_label_queue_lanes.py",
    ),
    "worker/shiwu_worker/loaders/protocol.py": ("tests/unit/loaders",),
    "worker/shiwu_worker/loaders/pool.py": ("tests/unit/loaders", "tests/hostile/test_lying_sandbox.py"),
    "worker/shiwu_worker/policy/access_rules.py": (
        "tests/unit/policy",
        "tests/hostile/test_operators_lists.py",
    ),
    "worker/shiwu_worker/policy/callback_rules.py": (
        "tests/unit/policy/test_callback_rules.py",
        "tests/unit/pipeline/test_admission.py",
    ),
    "producer/shiwu/hooks/delivery_queue.py": (
        "tests/integration/test_hooks_queue.py",
        "tests/integration/test_hooks_commands.py",
    ),
    "producer/shiwu/hooks/endpoints.py": ("tests/unit/hooks/test_endpoints.py", "tests/integration/test_hooks.py"),
    "producer/shiwu/hooks/options.py": ("tests/unit/hooks/test_options.py",),
    "producer/shiwu/hooks/signatures.py": ("tests/unit/hooks/test_signatures.py",),
    "producer/shiwu/network/address_rules.py": ("tests/unit/network", "tests/hostile/test_operators_lists.py"),
    "producer/shiwu/network/ip_ranges.py": (
        "tests/unit/network",
        "tests/hostile/test_ip_ranges.py",
    ),
    "worker/shiwu_worker/policy/retry.py": ("tests/unit/config/test_retry_settings.py", "tests/unit/pipeline"),
    "producer/shiwu/aio/client.py": AIO,
    "producer/shiwu/aio/connection.py": ("tests/unit/aio/test_connection.py", "tests/integration/test_redis_urls.py"),
    "producer/shiwu/aio/run_steps.py": AIO,
    "producer/shiwu/aio/subscription.py": AIO,
    "producer/shiwu/aio/waiter.py": AIO,
    "producer/shiwu/broker/answers.py": (
        "tests/unit/broker/test_answers.py",
        "tests/integration/test_connections.py",
        "tests/integration/test_stream.py",
        "tests/integration/test_dead_letters.py",
        "tests/integration/test_retention.py",
        "tests/integration/test_answered_ids.py",
        "tests/integration/test_waiting.py",
        "tests/integration/test_generations.py",
        "tests/integration/test_history.py",
        "tests/integration/test_message_ids.py",
    ),
    "producer/shiwu/broker/backoff.py": ("tests/unit/broker/test_backoff.py", "tests/unit/runtime/test_backoff.py"),
    "producer/shiwu/broker/cancel.py": ("tests/unit/broker/test_cancel.py", "tests/integration/test_deadlines.py"),
    "producer/shiwu/broker/connection.py": (
        "tests/unit/broker/test_connection.py",
        "tests/unit/broker/test_redis_url.py",
        "tests/integration/test_connections.py",
        "tests/integration/test_redis_urls.py",
        "tests/integration/test_redis_errors.py",
    ),
    "producer/shiwu/broker/deadline_scan.py": (
        "tests/unit/broker/test_deadline_scan.py",
        "tests/integration/test_deadlines.py",
        "tests/integration/test_forged_deadlines.py",
    ),
    "producer/shiwu/broker/expiry.py": (
        "tests/unit/broker/test_expiry.py",
        "tests/integration/test_deadlines.py",
        "tests/integration/test_swept_messages.py",
        "tests/integration/test_forged_deadlines.py",
    ),
    "producer/shiwu/broker/foreign_values.py": ("tests/integration/test_wrong_types.py",),
    "producer/shiwu/broker/maintenance.py": (
        "tests/unit/broker/test_maintenance.py",
        "tests/integration/test_claim.py",
        "tests/integration/test_deadlines.py",
        "tests/integration/test_retention.py",
        "tests/integration/test_dead_letters.py",
        "tests/integration/test_stream.py",
        "tests/integration/test_swept_messages.py",
    ),
    "producer/shiwu/broker/message_ids.py": ("tests/integration/test_message_ids.py",),
    "producer/shiwu/broker/message_reader.py": (
        *MESSAGES,
        "tests/unit/policy/test_callback_rules.py",
    ),
    "producer/shiwu/broker/message_times.py": (
        "tests/unit/broker/test_message_times.py",
        *MESSAGES,
    ),
    "producer/shiwu/broker/message_writer.py": ("tests/unit/broker", *CLIENT),
    "producer/shiwu/broker/queue_stats.py": (
        "tests/unit/broker/test_queue_stats.py",
        "tests/integration/test_queue_snapshot.py",
        *CLIENT,
    ),
    "producer/shiwu/broker/redis_errors.py": (
        "tests/integration/test_redis_errors.py",
        "tests/integration/test_redis_urls.py",
    ),
    "producer/shiwu/broker/redis_url.py": ("tests/unit/broker/test_redis_url.py",),
    "producer/shiwu/broker/retention.py": (
        "tests/integration/test_retention.py",
        "tests/integration/test_dead_letters.py",
    ),
    "producer/shiwu/broker/steps.py": ("tests/unit/broker/test_steps.py", *CLIENT),
    "producer/shiwu/broker/trace_headers.py": ("tests/unit/broker/test_trace_headers.py",),
    "producer/shiwu/client/arguments.py": CLIENT,
    "producer/shiwu/client/calls.py": (*CLIENT, "tests/integration/test_dead_letters.py"),
    "producer/shiwu/client/client.py": (
        *CLIENT,
        "tests/integration/test_waiting.py",
        "tests/integration/test_dead_letters.py",
        "tests/integration/test_deadlines.py",
        *CONSUMERS,
    ),
    "producer/shiwu/client/dead_letters.py": (
        "tests/unit/client/test_dead_letters.py",
        "tests/integration/test_dead_letters.py",
        "tests/integration/test_repeated_calls.py",
        "tests/integration/test_generations.py",
        "tests/integration/test_swept_messages.py",
    ),
    "producer/shiwu/client/items.py": (*CLIENT, "tests/unit/client/test_questions.py", *CONSUMERS),
    "producer/shiwu/client/results.py": ("tests/unit/client/test_results.py", "tests/compat/test_next_version.py"),
    "producer/shiwu/client/sender.py": (
        "tests/unit/client/test_sender.py",
        *CLIENT,
        "tests/integration/test_deadlines.py",
        "tests/integration/test_connections.py",
    ),
    "producer/shiwu/client/stream.py": ("tests/unit/client/test_stream.py", *CONSUMERS),
    "producer/shiwu/client/stream_items.py": (
        "tests/unit/client/test_stream_items.py",
        "tests/unit/client/test_stream.py",
        *CONSUMERS,
    ),
    "producer/shiwu/client/waiter.py": (
        "tests/unit/client/test_waiter.py",
        "tests/integration/test_waiting.py",
        "tests/integration/test_client.py",
    ),
    "producer/shiwu/contract/answer.py": (*CONTRACT, "tests/integration/test_result_errors.py"),
    "producer/shiwu/contract/ids.py": (*CONTRACT, "tests/integration/test_message_ids.py"),
    "producer/shiwu/contract/printable.py": CONTRACT,
    "producer/shiwu/contract/references.py": CONTRACT,
    "producer/shiwu/contract/request.py": CONTRACT,
    "producer/shiwu/contract/text.py": CONTRACT,
    "producer/shiwu/contract/unknown_fields.py": CONTRACT,
    "producer/shiwu/contract/vocabulary.py": CONTRACT,
}
"""Paths of modules, and for each the files or folders of its tests."""
