"""Growing pauses between tries."""

from __future__ import annotations

from shiwu.broker.backoff import Backoff


def test_backoff_doubles_up_to_its_limit() -> None:
    """After a reset it begins with the shortest pause again."""
    backoff = Backoff(first_s=0.5, max_s=3.0)
    assert not backoff.is_waiting
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.is_waiting
    backoff.reset()
    assert not backoff.is_waiting
    assert backoff.next_s() == 0.5
