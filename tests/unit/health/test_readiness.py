"""When a worker is ready, and which steps Celery's consumer has."""

from __future__ import annotations

import pytest
import structlog

from shiwu_worker.health.readiness import Readiness
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    """A clock that the test advances."""
    return Clock()


def test_worker_that_claims_and_receives_revokes_is_ready(clock: Clock) -> None:
    """In any order; losing either makes it not ready."""
    states: list[bool] = []
    readiness = Readiness(on_change=states.append, revoke_wait_s=15.0, clock=clock.monotonic)
    readiness.claiming(active=True)
    assert (states, readiness.is_waiting_for_revokes()) == ([], True)
    readiness.receiving_revokes(active=True)
    assert (states, readiness.is_waiting_for_revokes()) == ([True], False)
    readiness.receiving_revokes(active=False)
    assert states == [True, False]
    readiness.receiving_revokes(active=True)
    readiness.claiming(active=False)
    assert (states, readiness.is_waiting_for_revokes()) == ([True, False, True, False], False)
    readiness.claiming(active=True)
    assert states[-1]


def test_worker_without_broadcasts_is_ready_after_the_limit(clock: Clock) -> None:
    """The limit starts anew when claims succeed again, so that Celery has time to reconnect."""
    states: list[bool] = []
    readiness = Readiness(on_change=states.append, revoke_wait_s=15.0, clock=clock.monotonic)
    readiness.claiming(active=True)
    clock.now_s += 14
    readiness.claiming(active=False)
    clock.now_s += 100
    readiness.claiming(active=True)
    clock.now_s += 14
    readiness.check_limit()
    assert states == []
    clock.now_s += 2
    with structlog.testing.capture_logs() as logged:
        readiness.check_limit()
        readiness.check_limit()
    assert states == [True]
    assert [line["event"] for line in logged] == ["revokes_not_received"]


def test_broadcasts_are_awaited_only_until_they_are_received(clock: Clock) -> None:
    """Without most of its shards it is not ready, and broadcasts are not the reason."""
    states: list[bool] = []
    readiness = Readiness(on_change=states.append, revoke_wait_s=15.0, clock=clock.monotonic)
    readiness.claiming(active=True)
    readiness.receiving_revokes(active=True)
    readiness.most_shards_away(active=True)
    assert (states, readiness.is_waiting_for_revokes()) == ([True, False], False)
    readiness.receiving_revokes(active=False)
    assert readiness.is_waiting_for_revokes()
    clock.now_s += 16
    with structlog.testing.capture_logs() as logged:
        readiness.check_limit()
        readiness.check_limit()
    assert (states, readiness.is_waiting_for_revokes()) == ([True, False], False)
    assert [line["event"] for line in logged] == ["revokes_not_received"]
    readiness.most_shards_away(active=False)
    assert states == [True, False, True]


def test_worker_with_revokes_off_is_ready_when_it_claims() -> None:
    """If revokes are switched off there is nothing to wait for."""
    states: list[bool] = []
    readiness = Readiness(on_change=states.append, revoke_wait_s=0.0)
    readiness.claiming(active=True)
    assert states == [True]
