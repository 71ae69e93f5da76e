"""Steps of maintenance: by workers, by sweeps, and by Celery's revoke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.protocol.alphabet import FAULTS, REPEATS, step
from tests.protocol.client_steps import cancel, requeue
from tests.protocol.simulated_redis import Fault
from tests.protocol.worker_steps import claim, commit, release
from tests.protocol.world import IDS, UNSENT_ID, World

SWEEPS: Final = ("maintain", "take_late", "take_late", "commit", "trim", "move_foreign", "drop_answered")
"""Scripts that a sweep runs."""


@step((0, 1), FAULTS, scripts=["maintain"], weight=6)
def maintain(world: World, number: int, fault: Fault) -> None:
    """A worker does maintenance."""
    maintenance = world.workers[number].maintenance

    def call(_: World) -> None:
        maintenance.trim_if_long(world.again_if_failed(maintenance.run_once))

    world.perform("maintain", call, fault)


@step(SWEEPS, ("", "lost", "repeated", "unsent"), scripts=SWEEPS, weight=4)
def sweep(world: World, script: str, fault: Fault) -> None:
    """A sweep does all that is due; the fault happens to one of its calls."""
    world.perform("sweep", lambda w: w.sweeper.sweep(), fault, of=f"{script}.lua")


@step(
    (0, 1), ("take_late", "commit"), ("claim", "claim_and_defer", "commit", "maintain", "requeue", "cancel"), weight=5
)
def sweep_interrupted(world: World, number: int, before: str, what: str) -> None:
    """A sweep does all that is due; before one of its calls, a worker or a client does something."""

    def meanwhile() -> None:
        world.checkpoint()
        if what in {"claim", "claim_and_defer"}:
            claim(world, number, 5, "")
            if what == "claim_and_defer":
                release(world, number, "deferred", "")
        elif what == "commit":
            commit(world, number, "failed", 5, "")
        elif what == "maintain":
            maintain(world, number, "")
        else:
            for job_id in IDS:
                (requeue if what == "requeue" else cancel)(world, job_id, "")

    def call(_: World) -> None:
        world.client.interruptions = {f"{before}.lua": meanwhile}
        world.sweeper.sweep()

    world.perform("sweep", call)
    world.client.interruptions = {}


@step(("workers", "sweep"), ("length", "bytes", "dead"), REPEATS, scripts=["trim", "trim_dead"], weight=1)
def trim(world: World, who: str, what: str, fault: Fault) -> None:
    """A worker or a sweep trims the stream or the dead letters."""
    maintenance = world.sweeper if who == "sweep" else world.workers[0].maintenance
    calls: dict[str, Callable[[], object]] = {
        "length": maintenance.trim,
        "bytes": lambda: maintenance.trim(bytes_over=1),
        "dead": lambda: maintenance.trim_dead(bytes_over=1),
    }
    world.perform("trim", lambda w: w.again_if_failed(calls[what]), fault)


@step((*IDS, UNSENT_ID), FAULTS, scripts=["revoke", "commit"], weight=3)
def revoke(world: World, job_id: str, fault: Fault) -> None:
    """Celery's revoke names an id."""
    revoker = world.workers[0].revoker
    if job_id == UNSENT_ID or job_id in world.sent.values():

        def call(_: World) -> None:
            world.notes.named = frozenset({job_id})
            world.again_if_failed(lambda: revoker.revoke([job_id]))

        world.perform("revoke", call, fault)
