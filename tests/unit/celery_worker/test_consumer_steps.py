"""The steps of Celery's consumer in this worker, as Celery builds them with all that they require."""

from __future__ import annotations

import pytest
from celery.worker.consumer import Consumer

from shiwu_worker.celery_worker.worker_app import AdminConsumer, make_app
from shiwu_worker.config.settings import Settings


def built(blueprint: Consumer.Blueprint) -> set[str]:
    """Short names of the steps that Celery starts, required ones included."""
    blueprint.steps = blueprint.claim_steps()
    return {step.name.rsplit(".", 1)[-1] for step in blueprint._finalize_steps(blueprint.steps)}


def test_consumer_has_no_step_that_waits_for_other_workers() -> None:
    """Mingle waits for replies of other workers; a Redis that hangs meanwhile would end a worker that claims."""
    app = make_app(Settings(redis_url="redis://127.0.0.1:6379/0"))
    assert built(AdminConsumer.Blueprint(steps=app.steps["consumer"])) == {
        "Connection",
        "Events",
        "Tasks",
        "Control",
        "Evloop",
    }


def test_steps_of_celery_exist_in_this_version() -> None:
    """The names stand as text in the blueprint, so a rename in Celery must be noticed here."""
    assert {"Connection", "Events", "Tasks", "Control", "Evloop", "Mingle"} <= built(Consumer.Blueprint())


def test_lost_connection_means_no_revokes_before_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pause the pipeline may have Redis again; a worker that is ready then would miss revokes."""
    app = make_app(Settings(redis_url="redis://127.0.0.1:6379/0"))
    reported: list[object] = []
    app.shiwu_on_receiving_revokes = lambda *, active: reported.append(active)
    monkeypatch.setattr(AdminConsumer, "_pause", lambda _: reported.append("pause"))
    monkeypatch.setattr(Consumer, "on_connection_error_after_connected", lambda *_: None)
    consumer = object.__new__(AdminConsumer)
    consumer.app = app
    consumer.on_connection_error_after_connected(ConnectionError())
    assert reported == [False, "pause"]
