"""States of the queues, as a worker would count them."""

from __future__ import annotations

from shiwu.broker.queue_stats import QueueSnapshot
from shiwu.contract import Lane


def make_snapshot(
    *, at_s: float = 1000.0, waiting: int, urgent: int = 0, answered: int = 0, oldest_age_s: float | None = None
) -> QueueSnapshot:
    """The lanes at one moment."""
    return QueueSnapshot(
        at_ms=at_s * 1000,
        waiting={Lane.INTERACTIVE: urgent, Lane.BULK: waiting},
        claimed=dict.fromkeys(Lane, 0),
        oldest_ms={} if oldest_age_s is None else {Lane.BULK: (at_s - oldest_age_s) * 1000},
        delayed=0,
        quarantined=0,
        dead=9,
        answered=answered,
    )
