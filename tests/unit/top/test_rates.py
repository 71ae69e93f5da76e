"""Rates and histories of lanes, from snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shiwu.contract import Lane
from shiwu.top.look import LaneLook
from shiwu.top.rates import LaneRates
from tests.support.snapshots import make_snapshot


def bulk(rates: LaneRates, *, now_s: float, answered: Sequence[Lane] = (Lane.BULK,)) -> LaneLook:
    """The bulk lane."""
    [look] = [look for look in rates.lanes(now_ms=now_s * 1000, answered=answered) if look.lane is Lane.BULK]
    return look


def test_rates_are_unknown_with_one_snapshot() -> None:
    rates = LaneRates()
    rates.add(make_snapshot(at_s=1000, waiting=5, answered=7))
    look = bulk(rates, now_s=1001)
    assert (look.waiting, look.in_per_s, look.out_per_s, rates.answers_per_s()) == (5, None, None, None)


def test_jobs_in_are_answers_and_what_waits_longer() -> None:
    """100 answers and 50 waiting jobs more in 10 s."""
    rates = LaneRates()
    rates.add(make_snapshot(at_s=1000, waiting=10, answered=0))
    rates.add(make_snapshot(at_s=1010, waiting=60, answered=100))
    look = bulk(rates, now_s=1010)
    assert (look.in_per_s, look.out_per_s) == (15.0, 10.0)


def test_answers_are_divided_as_the_newest_ones_are() -> None:
    rates = LaneRates()
    rates.add(make_snapshot(at_s=1000, waiting=0, answered=0))
    rates.add(make_snapshot(at_s=1010, waiting=0, answered=100))
    looks = rates.lanes(now_ms=1_010_000, answered=[Lane.BULK] * 3 + [Lane.INTERACTIVE])
    assert {look.lane: look.out_per_s for look in looks} == {Lane.INTERACTIVE: 2.5, Lane.BULK: 7.5}
    assert bulk(rates, now_s=1010, answered=()).out_per_s is None


def test_rate_is_that_of_the_last_seconds() -> None:
    """A minute without answers before does not count."""
    rates = LaneRates()
    for at_s in range(1000, 1065, 5):
        rates.add(make_snapshot(at_s=at_s, waiting=0, answered=0))
    for at_s in range(1065, 1085, 5):
        rates.add(make_snapshot(at_s=at_s, waiting=0, answered=(at_s - 1060) * 10))
    assert rates.answers_per_s() == pytest.approx(10.0)


def test_emptied_database_begins_again() -> None:
    """Fewer answers than before are those of another database."""
    rates = LaneRates()
    rates.add(make_snapshot(at_s=1000, waiting=0, answered=500))
    rates.add(make_snapshot(at_s=1005, waiting=3, answered=1))
    look = bulk(rates, now_s=1005)
    assert (look.waiting, look.out_per_s, look.history) == (3, None, (3,))


def test_history_has_a_value_for_each_five_seconds() -> None:
    """Also where snapshots come less often; it is never longer than five minutes."""
    rates = LaneRates()
    rates.add(make_snapshot(at_s=1000, waiting=4))
    rates.add(make_snapshot(at_s=1015, waiting=9))
    assert bulk(rates, now_s=1017).history == (4, 4, 4, 9)
    for at_s in range(1020, 1620, 15):
        rates.add(make_snapshot(at_s=at_s, waiting=at_s))
    history = bulk(rates, now_s=1605).history
    assert len(history) == 60
    assert history[-1] == 1605
    assert len(rates._snapshots) <= 22


def test_same_snapshot_counts_once() -> None:
    rates = LaneRates()
    for _ in range(3):
        rates.add(make_snapshot(at_s=1000, waiting=4, oldest_age_s=30))
    assert rates.answers_per_s() is None
    assert bulk(rates, now_s=1002).oldest_s == 32.0
