"""Every name in Redis but the lanes, which `Lane` knows."""

from __future__ import annotations

from typing import Final

RESULT_STREAM: Final = "shiwu:results"
CLAIMS: Final = "shiwu:claims"
"""Hash: job id → `token|attempt|lane key|message bytes` of every claimed job."""
LEASES: Final = "shiwu:leases"
"""Sorted set: job id → server time in ms at which its lease ends."""
ATTEMPTS: Final = "shiwu:attempts"
"""Hash: job id → attempts so far, for jobs that came back to their lane."""
DELAYED: Final = "shiwu:delayed"
"""Sorted set: job id → server time in ms at which the job returns to its lane."""
PARKED: Final = "shiwu:parked"
"""Hash: job id → `lane key|message bytes` of every delayed job."""
DEAD: Final = "shiwu:dead"
"""Stream of dead letters: raw message, reason, stage, attempts, worker."""
COUNTERS: Final = "shiwu:counters"
"""Hash: totals over all workers (answered, duplicates, reaped, …)."""
WORKERS: Final = "shiwu:workers"
"""Sorted set: worker name → server time in ms of its last sign of life."""


def result_key(job_id: str) -> str:
    """Where Celery looks for the result of a task, and the channel on which it is announced."""
    return f"celery-task-meta-{job_id}"


def done_key(job_id: str) -> str:
    """The mark of an answered id; it outlives the answer."""
    return f"shiwu:done:{job_id}"
