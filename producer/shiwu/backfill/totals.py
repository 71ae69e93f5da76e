"""Counts over the answers of a backfill, in a form that adds up over parts, processes and crashes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from shiwu.contract import Answer, Status

GROWTH: Final = 1.05
"""Times are counted in steps of 5 %."""
GROUPS: Final = ("status", "code", "model", "labels", "ms")
"""First words of the counters; the state of a backfill has a field for each, as `status:tagged`."""


class Totals:
    """Counters of answers: status, error code, model, label set and total time."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts = Counter(counts or {})

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Totals:
        """Read the counters among the fields of a backfill's state."""
        return cls({name: int(text) for name, text in fields.items() if name.partition(":")[0] in GROUPS})

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        counts = self.counts
        counts[f"status:{answer.status}"] += 1
        if answer.error is not None:
            counts[f"code:{answer.error.code}"] += 1
        if answer.model is not None:
            counts[f"model:{answer.model.id}@{answer.model.revision}"] += 1
        if answer.labels is not None:
            counts[f"labels:{answer.labels.digest}"] += 1
        if answer.timing.total > 0:
            counts[f"ms:{round(math.log(answer.timing.total, GROWTH))}"] += 1

    def plus(self, other: Totals) -> Totals:
        """The sum of both."""
        return Totals(self.counts + other.counts)

    def by(self, group: str) -> dict[str, int]:
        """The counters of one group, largest first."""
        prefix = f"{group}:"
        found = {name.removeprefix(prefix): n for name, n in self.counts.items() if name.startswith(prefix) and n}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def answered(self) -> int:
        """How many answers were counted."""
        return sum(self.by("status").values())

    @property
    def failed(self) -> int:
        """Answers without tags, except for those of jobs that were cancelled on purpose."""
        statuses = self.by("status")
        return sum(statuses.values()) - statuses.get(Status.TAGGED, 0) - statuses.get(Status.CANCELLED, 0)

    def percentile_ms(self, share: float) -> float | None:
        """The time from enqueueing to the answer within which this share of jobs ended, to 5 %; None without times."""
        steps = {int(step): count for step, count in self.by("ms").items()}
        left = share * sum(steps.values())
        for step in sorted(steps):
            left -= steps[step]
            if left <= 0:
                return float(round(GROWTH**step, 1))
        return None

    def summary(self) -> dict[str, Any]:
        """The counts for a summary: answered, status, codes, models, labels, p50 and p95."""
        return {
            "answered": self.answered,
            "by_status": self.by("status"),
            "by_code": self.by("code"),
            "models": self.by("model"),
            "labels": self.by("labels"),
            "total_ms_p50": self.percentile_ms(0.5),
            "total_ms_p95": self.percentile_ms(0.95),
        }
