"""The usual times of stages, from a sample of answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shiwu.contract import Timing


@dataclass(frozen=True, slots=True)
class UsualTime:
    """Milliseconds of a stage in the newest answers."""

    p50: float
    p95: float


def usual_times(timings: Iterable[Timing]) -> dict[str, UsualTime]:
    """Field of `Timing` → its usual time, for each field that one of the timings has."""
    times: dict[str, list[float]] = {}
    for timing in timings:
        for name in timing.__struct_fields__:
            if (value := getattr(timing, name)) is not None:
                times.setdefault(name, []).append(value)
    return {name: UsualTime(_percentile(values, 0.5), _percentile(values, 0.95)) for name, values in times.items()}


def _percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of at least one value."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
