"""Log lines of what the policies have learned."""

from __future__ import annotations

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.tuning.batch_size_policy import BatchSizeChange
from shiwu_worker.stages.encode.tuning.thread_policy import ThreadChange

log: FilteringBoundLogger = structlog.get_logger()


def log_size_change(change: BatchSizeChange) -> None:
    """Log that the largest batch has another size."""
    sizes = {"from": change.before, "to": change.now}
    log.info("batch_size_changed", **sizes, reason=change.reason, images_per_s=change.images_per_s)


def log_thread_change(change: ThreadChange) -> None:
    """Log that the model uses other threads."""
    threads = {"from": change.before.threads, "to": change.now.threads}
    threads |= {"together_from": change.together_before, "together_to": change.together}
    log.info("model_threads_changed", **threads, divided=change.now.splits_batches, reason=change.reason)
