"""How often a failed job is tried again, and what one worker may hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from typing import Final

MAX_DOUBLINGS: Final = 64
"""More make any pause longer than ten years, the longest that a setting may ask for."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and with which pauses, a job with one class of error is tried."""

    attempts: int
    first_s: float
    longest_s: float

    def delay_s(self, attempt: int) -> float:
        """The pause after this attempt: doubling, with jitter down to a half, so that jobs do not return together."""
        # Bounded, because a float overflows at 2 ** 1024, and a job may be tried more often.
        doublings = min(attempt - 1, MAX_DOUBLINGS)
        return min(self.longest_s, self.first_s * 2.0**doublings) * random.uniform(0.5, 1.0)  # noqa: S311 no secret


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """What a pipeline may hold, and when it gives a job up."""

    slots: int
    """Images whose pixels there is room for."""
    max_attempts: int
    """How many worker deaths a job may be involved in before it is given up."""
    retries: Mapping[str, RetryPolicy] = field(default_factory=dict)
    """Retry policies by error code; all other errors are answered immediately."""
    longest_pause_s: float = 300.0
    """Longest pause that a source may ask for; longer ones count as this."""
    longest_eta_s: float = 7 * 86_400
    """How far in the future an eta may be; Redis holds the message until then."""
    zone: tzinfo = UTC
    """Time zone of an eta or expires that names none."""
