"""How long the workers need for what waits."""

from __future__ import annotations

import pytest

from shiwu.broker.backlog import BacklogEstimator
from shiwu.contract import Lane
from tests.support.snapshots import make_snapshot


def test_backlog_seconds_use_the_rate_of_all_workers() -> None:
    """At ten jobs a second, 100 jobs in bulk also wait for the 20 in interactive."""
    pace = BacklogEstimator()
    pace.backlog_s(make_snapshot(at_s=1000, waiting=300, answered=0))
    found = pace.backlog_s(make_snapshot(at_s=1010, waiting=100, urgent=20, answered=100))
    assert found == pytest.approx({Lane.INTERACTIVE: 2.0, Lane.BULK: 12.0})


def test_backlog_without_a_rate_is_its_age() -> None:
    """Without answers the estimate grows; it ends with the backlog."""
    pace = BacklogEstimator()
    assert pace.backlog_s(make_snapshot(at_s=1000, waiting=5))[Lane.BULK] == 0.0
    assert pace.backlog_s(make_snapshot(at_s=1030, waiting=5))[Lane.BULK] == 30.0
    assert pace.backlog_s(make_snapshot(at_s=1040, waiting=5, oldest_age_s=200))[Lane.BULK] == 200.0
    assert pace.backlog_s(make_snapshot(at_s=1050, waiting=0))[Lane.BULK] == 0.0
    assert pace.backlog_s(make_snapshot(at_s=1060, waiting=1))[Lane.BULK] == 0.0


def test_rate_of_idle_workers_does_not_count() -> None:
    """Answers without a backlog do not show the possible rate, so they are not counted."""
    pace = BacklogEstimator()
    pace.backlog_s(make_snapshot(at_s=1000, waiting=0, answered=0))
    pace.backlog_s(make_snapshot(at_s=1030, waiting=0, answered=30))
    assert pace.backlog_s(make_snapshot(at_s=1035, waiting=100, answered=530))[Lane.BULK] == pytest.approx(1.0)


def test_rate_is_that_of_the_last_minute() -> None:
    """However often snapshots come."""
    pace = BacklogEstimator()
    for at_s in range(1000, 1100):
        pace.backlog_s(make_snapshot(at_s=at_s, waiting=100, answered=1000))
    found = pace.backlog_s(make_snapshot(at_s=1100, waiting=100, answered=1600))
    assert found[Lane.BULK] == pytest.approx(10.0)
