"""Times of a message: numbers are seconds or milliseconds by their size, texts have a zone or get one."""

from __future__ import annotations

from datetime import UTC
from zoneinfo import ZoneInfo

import pytest

from shiwu.broker.message_times import MAX_MS, MIN_TIME_MS, MIN_TIME_S, absolute_ms
from shiwu.contract import RequestError


def test_number_is_in_milliseconds_from_the_bound_on() -> None:
    """The bound itself too; below it, a number is in seconds."""
    assert absolute_ms(MIN_TIME_MS, "eta", zone=UTC) == MIN_TIME_MS
    assert absolute_ms(MIN_TIME_MS - 1, "eta", zone=UTC) == (MIN_TIME_MS - 1) * 1000


def test_number_that_is_no_time_is_refused() -> None:
    """A duration, a number beyond all times, a bool; the least time is one."""
    assert absolute_ms(MIN_TIME_S, "eta", zone=UTC) == MIN_TIME_S * 1000
    assert absolute_ms(None, "eta", zone=UTC) is None
    for wrong in (MIN_TIME_S - 1, 60, -MAX_MS, MAX_MS, int(MAX_MS), True, float("nan"), float("inf"), [1]):
        with pytest.raises(RequestError, match="expected eta as an ISO 8601 time or as seconds or milliseconds"):
            absolute_ms(wrong, "eta", zone=UTC)


def test_text_without_a_zone_is_in_the_workers() -> None:
    """Eight hours earlier in Shanghai; a zone of its own counts more."""
    assert absolute_ms("1970-01-02T00:00:00", "eta", zone=UTC) == 86_400_000
    assert absolute_ms("1970-01-02T00:00:00", "eta", zone=ZoneInfo("Asia/Shanghai")) == 57_600_000
    assert absolute_ms("1970-01-02T00:00:00+00:00", "eta", zone=ZoneInfo("Asia/Shanghai")) == 86_400_000
    with pytest.raises(RequestError, match="eta"):
        absolute_ms("tomorrow", "eta", zone=UTC)
