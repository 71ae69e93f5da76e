"""The keys of webhooks in Redis. Formats only grow, because two versions may share one Redis."""

from __future__ import annotations

from typing import Final

DELIVERIES: Final = "shiwu:hooks:deliveries"
"""Hash: `endpoint|webhook id` → `created in ms|failed tries|takes|payload` of every delivery that is not made yet."""
DUE: Final = "shiwu:hooks:due"
"""Sorted set: endpoint → server time in ms at which to look for deliveries of it that are due."""
PENDING: Final = "shiwu:hooks:due:"
"""Prefix of a sorted set for each endpoint: webhook id → server time in ms at which it is due. A process that takes a
delivery moves its time behind the lease, so that another process takes it if the first one crashes."""
HEALTH: Final = "shiwu:hooks:endpoints"
"""Hash: endpoint → `failures in a row|no try before, in ms|disabled since, in ms|last failure in ms|its reason`."""
DEAD: Final = "shiwu:hooks:dead"
"""Sorted set: `endpoint|webhook id` → server time in ms at which the delivery was given up."""
DEAD_DELIVERIES: Final = "shiwu:hooks:dead:deliveries"
"""Hash: `endpoint|webhook id` → `reason|` and the record of a delivery that was given up."""
COMMON: Final = (DELIVERIES, DUE, HEALTH, DEAD, DEAD_DELIVERIES)
"""The first keys of every script."""


def pending_key(endpoint: str) -> str:
    """The sorted set of an endpoint's deliveries."""
    return f"{PENDING}{endpoint}"
