"""Prometheus metrics of the queues, which workers and `shiwu sweep` export under the same names.

Importing this module needs prometheus-client: the extra `metrics` or `worker`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shiwu.contract import Lane

_LANE_GAUGES = (
    ("waiting", "shiwu_queue_waiting", "Messages in the lane, of all workers."),
    ("claimed", "shiwu_queue_claimed", "Jobs that a worker holds, of all workers."),
    ("oldest_age_s", "shiwu_queue_oldest_age_seconds", "Age of the oldest message; 0 where none waits."),
    ("backlog_s", "shiwu_queue_backlog_seconds", "Time to empty the lane at the rate of all workers."),
)
_PLAIN_GAUGES = (
    ("delayed", "shiwu_queue_delayed", "Jobs that wait for another attempt."),
    ("dead", "shiwu_dead_letters", "Dead letters that are kept."),
)


@dataclass(frozen=True, slots=True)
class QueueNumbers:
    """Sizes of the queues at one moment."""

    waiting: Mapping[Lane, int]
    claimed: Mapping[Lane, int]
    oldest_age_s: Mapping[Lane, float]
    delayed: int
    dead: int
    backlog_s: Mapping[Lane, float] = field(default_factory=dict)
    """Seconds until the lane is empty; absent lanes are not exported."""


class QueueCollector(Collector):
    """Exports the newest queue sizes. Thread-safe: `update` and `forget` replace one reference.

    It exports no series while the sizes are unknown, because a constant value would hide that Redis is unavailable.
    """

    def __init__(self) -> None:
        self._numbers: QueueNumbers | None = None

    def update(self, numbers: QueueNumbers) -> None:
        """Export these numbers from now on."""
        self._numbers = numbers

    def forget(self) -> None:
        """Export nothing until the next `update`."""
        self._numbers = None

    def describe(self) -> Iterator[Metric]:
        """The names, for the registry's check that no two collectors share one."""
        for _, name, text in (*_LANE_GAUGES, *_PLAIN_GAUGES):
            yield GaugeMetricFamily(name, text)

    def collect(self) -> Iterator[Metric]:
        """The series of the newest numbers, or none."""
        numbers = self._numbers
        if numbers is None:
            return
        for attribute, name, text in _LANE_GAUGES:
            family = GaugeMetricFamily(name, text, labels=["lane"])
            of_lanes: Mapping[Lane, float] = getattr(numbers, attribute)
            for lane in Lane:
                if attribute == "oldest_age_s":
                    family.add_metric([lane.value], of_lanes.get(lane, 0.0))
                elif lane in of_lanes:
                    family.add_metric([lane.value], of_lanes[lane])
            if family.samples:
                yield family
        for attribute, name, text in _PLAIN_GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(numbers, attribute))
