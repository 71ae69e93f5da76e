"""The retry setting: tries and pauses for each error code."""

from __future__ import annotations

import pytest

from shiwu.contract import ErrorCode
from shiwu_worker.config.settings import Settings
from shiwu_worker.policy.retry import RetryPolicy


def test_retries_are_read_by_error_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts `code=tries:first_s:longest_s` for retryable errors only."""
    monkeypatch.setenv("SHIWU_RETRY", "source_unavailable=5:1:30, encode_failed=2:0.5:1")
    assert Settings().retry == {ErrorCode.SOURCE_UNAVAILABLE: (5, 1.0, 30.0), ErrorCode.ENCODE_FAILED: (2, 0.5, 1.0)}
    for wrong in ("source_not_found=3:1:2", "source_unavailable=0:1:2", "encode_failed=2:9:1", "nonsense"):
        monkeypatch.setenv("SHIWU_RETRY", wrong)
        with pytest.raises(ValueError, match="expected"):
            Settings()


def test_retry_delays_double_up_to_a_limit() -> None:
    """A pause is at most the longest one, and at least half of it."""
    policy = RetryPolicy(attempts=9, first_s=2.0, longest_s=30.0)
    for attempt, full in ((1, 2.0), (2, 4.0), (3, 8.0), (6, 30.0)):
        delays = [policy.delay_s(attempt) for _ in range(50)]
        assert full / 2 <= min(delays)
        assert max(delays) <= full
        assert len(set(delays)) > 10


def test_retry_delay_of_any_attempt_is_a_number() -> None:
    """A job may be tried thousands of times, as `source_unavailable=100000:1:60` allows."""
    policy = RetryPolicy(attempts=100_000, first_s=1.0, longest_s=60.0)
    for attempt in (64, 1025, 99_999):
        assert 30.0 <= policy.delay_s(attempt) <= 60.0
