"""Views of the settings that are more than a copy."""

from __future__ import annotations

import pytest

from shiwu.contract import Lane
from shiwu_worker.config import views
from shiwu_worker.config.settings import Settings


@pytest.mark.parametrize(("lanes", "reserve"), [((Lane.BULK,), 0), ((Lane.INTERACTIVE, Lane.BULK), 2)])
def test_worker_of_one_lane_reserves_nothing(lanes: tuple[Lane, ...], reserve: int) -> None:
    """Its bulk jobs may have all threads and slots."""
    assert views.load_shares(Settings(lanes=lanes)).reserve_of(8) == reserve


@pytest.mark.parametrize(("min_rate_after_s", "slow_s"), [(5.0, 3.0), (2.0, 2.0)])
def test_body_that_is_given_up_for_its_rate_counts_as_slow(min_rate_after_s: float, slow_s: float) -> None:
    """Otherwise its host would never come last."""
    assert views.load_shares(Settings(min_rate_after_s=min_rate_after_s)).slow_s == slow_s


@pytest.mark.parametrize(("fetch_s", "load_s", "limit_s"), [(15.0, 30.0, 15.0), (60.0, 30.0, 27.0)])
def test_slow_source_ends_its_fetch_and_not_its_loader(fetch_s: float, load_s: float, limit_s: float) -> None:
    """It is `source_unavailable` and retried; a loader that is replaced twice makes it `decoder_timeout`."""
    settings = Settings(fetch_timeout_s=fetch_s, load_timeout_s=load_s)
    assert views.fetch_limits(settings).total_timeout_s == pytest.approx(limit_s)
