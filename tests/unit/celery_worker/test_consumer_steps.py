"""The steps of Celery's consumer in this worker, as Celery builds them with all that they require."""

from __future__ import annotations

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
