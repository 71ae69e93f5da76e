"""When a worker is ready, and which parts Celery's consumer is made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import structlog

from shiwu_worker.celery_worker.worker_app import AdminConsumer, make_app
from shiwu_worker.config.settings import Settings
from shiwu_worker.health.readiness import Readiness
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes when it is told to."""
    made = Clock()
    monkeypatch.setattr("shiwu_worker.health.readiness.time", made)
    return made


def test_worker_is_ready_when_it_claims_and_hears(clock: Clock) -> None:
    """Both, in any order; each of them can be lost again."""
    told: list[bool] = []
    readiness = Readiness(on_change=told.append, revoke_wait_s=15.0)
    readiness.claiming(active=True)
    assert (told, readiness.is_waiting_for_revokes()) == ([], True)
    readiness.receiving_revokes(active=True)
    assert (told, readiness.is_waiting_for_revokes()) == ([True], False)
    readiness.receiving_revokes(active=False)
    assert told == [True, False]
    readiness.receiving_revokes(active=True)
    readiness.claiming(active=False)
    assert (told, readiness.is_waiting_for_revokes()) == ([True, False, True, False], False)
    readiness.claiming(active=True)
    assert told[-1]


def test_worker_that_never_hears_is_ready_in_the_end(clock: Clock) -> None:
    """The limit runs while it claims: a Redis that was away for long gives Celery's half its time again."""
    told: list[bool] = []
    readiness = Readiness(on_change=told.append, revoke_wait_s=15.0)
    readiness.claiming(active=True)
    clock.now_s += 14
    readiness.claiming(active=False)
    clock.now_s += 100
    readiness.claiming(active=True)
    clock.now_s += 14
    readiness.check_limit()
    assert told == []
    clock.now_s += 2
    with structlog.testing.capture_logs() as said:
        readiness.check_limit()
        readiness.check_limit()
    assert told == [True]
    assert [one["event"] for one in said] == ["revokes_not_received"]


def test_worker_without_revokes_is_ready_when_it_claims() -> None:
    """Where the operator does not listen to them, there is nothing to wait for."""
    told: list[bool] = []
    readiness = Readiness(on_change=told.append, revoke_wait_s=0.0)
    readiness.claiming(active=True)
    assert told == [True]


def test_consumer_has_no_mingle_gossip_or_heart() -> None:
    """Parts by which workers talk to each other; one of them came back as a dependency of another step."""
    app = make_app(Settings())
    pool, controller = SimpleNamespace(is_green=False), SimpleNamespace(use_eventloop=False)
    consumer = AdminConsumer(lambda *_: None, app=app, hostname="worker@host", pool=pool, controller=controller)
    names = {type(step).__name__ for step in consumer.steps}
    assert names == {"Connection", "Events", "Tasks", "ControlStep", "Evloop"}
