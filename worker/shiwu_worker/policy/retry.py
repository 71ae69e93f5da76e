"""How often a failed job is tried again, and what one worker may hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and with which pauses, a job with one class of error is tried."""

    attempts: int
    first_s: float
    longest_s: float

    def delay_s(self, attempt: int) -> float:
        """The pause after this attempt: doubling, with jitter down to a half, so that jobs do not return together."""
        return min(self.longest_s, self.first_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 no secret


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """What a pipeline may hold, and how patient it is."""

    slots: int
    """Images whose pixels there is room for."""
    max_attempts: int
    """How many workers a job may end before it is given up."""
    retries: Mapping[str, RetryPolicy] = field(default_factory=dict)
    """Classes of errors that are tried again; all others are answered at once."""
    longest_pause_s: float = 300.0
    """Longest pause that a source may ask for; longer ones count as this."""
    zone: tzinfo = UTC
    """Time zone of an eta or expires that names none."""
    wanted: Callable[[], int] | None = None
    """How many of the slots the batches of now need; None: all. What is not needed waits in Redis for any worker."""
