"""Histograms that take many values in one call; a job has nine durations, and a call for each would cost too much."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LONG_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)


class BatchHistogram(Collector):
    """A Prometheus histogram with one label and a fixed set of its values. Thread-safe.

    Args:
        label: name of the label.
        values: all values of the label; `observe` names them by index.
        buckets: upper bounds, ascending, without infinity.
    """

    def __init__(self, name: str, text: str, *, label: str, values: Sequence[str], buckets: Sequence[float]) -> None:
        self._name, self._text, self._label = name, text, label
        self._values = tuple(values)
        self._bounds = np.array(buckets)
        self._counts = np.zeros((len(self._values), len(buckets) + 1), np.int64)
        self._sums = np.zeros(len(self._values))
        self._lock = threading.Lock()

    def observe(self, rows: NDArray[np.intp], numbers: NDArray[np.float64]) -> None:
        """Add numbers, each to the label value with the index `rows`; NaN is skipped. Both shapes are (n,)."""
        known = ~np.isnan(numbers)
        if not known.all():
            rows, numbers = rows[known], numbers[known]
        width = len(self._bounds) + 1
        buckets = rows * width + np.searchsorted(self._bounds, numbers)
        counts = np.bincount(buckets, minlength=self._counts.size).reshape(self._counts.shape)
        sums = np.bincount(rows, weights=numbers, minlength=len(self._values))
        with self._lock:
            self._counts += counts
            self._sums += sums

    def describe(self) -> Iterator[Metric]:
        """Return the name without numbers, as the registry asks for it at registration."""
        yield HistogramMetricFamily(self._name, self._text, labels=[self._label])

    def collect(self) -> Iterator[Metric]:
        """Return the counts up to now."""
        with self._lock:
            counts, sums = self._counts.cumsum(axis=1).tolist(), self._sums.tolist()
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for value, row, total in zip(self._values, counts, sums, strict=True):
            family.add_metric([value], list(zip(bounds, row, strict=True)), total)
        yield family
