"""The steps of Celery's consumer in this worker, as Celery builds them with all that they require."""

from __future__ import annotations

from types import SimpleNamespace

from celery.worker.consumer import Consumer

from shiwu_worker.celery_worker.worker_app import SIGNAL_POLL_S, AdminConsumer, make_app
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


def test_consumer_without_an_event_loop_looks_for_signals_often() -> None:
    """On a cluster. Celery's loop would let each read take two seconds, and a stop wait so long."""
    consumer = object.__new__(AdminConsumer)
    consumer.hub, consumer.first_connection_attempt, consumer.broker_connection_retry_attempt = None, True, 0
    consumer.app = make_app(Settings(redis_url="cluster://127.0.0.1:6379/?shards=2"))
    timeouts: list[float] = []

    def read(timeout: float) -> None:
        timeouts.append(timeout)

    connection = consumer.app.connection_for_read()
    connection.drain_events = read
    consumer.ensure_connected(connection).drain_events(timeout=2.0)
    assert timeouts == [SIGNAL_POLL_S]
    consumer.hub = SimpleNamespace(register_with_event_loop=None)
    timeouts.clear()
    connection.drain_events = read
    consumer.ensure_connected(connection).drain_events(timeout=2.0)
    assert timeouts == [2.0]
    connection.release()
