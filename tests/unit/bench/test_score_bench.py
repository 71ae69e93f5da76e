"""The benchmark of scoring."""

from __future__ import annotations

import argparse

from bench import score
from bench.score import Figures


def test_cost_of_scoring_is_measured_for_each_size() -> None:
    """The figures say nothing on a machine that tests share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    score.add_options(parser)
    asked = parser.parse_args(["--quick", "--labels", "2,300", "--batches", "1,3", "--width", "8", "--seconds", "0.01"])
    figures = score.run(asked).figures
    assert isinstance(figures, Figures)
    assert [(cost.batch, cost.labels) for cost in figures.costs] == [(1, 2), (1, 300), (3, 2), (3, 300)]
    assert all(min(cost.total_us, cost.product_us, cost.softmax_us, cost.tags_us) > 0 for cost in figures.costs)
