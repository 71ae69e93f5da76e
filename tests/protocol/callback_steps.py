"""Steps of callbacks: they are sent, and may be interrupted."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from tests.protocol.alphabet import FAULTS, step
from tests.protocol.client_steps import enqueue, requeue
from tests.protocol.outside_steps import move_clock
from tests.protocol.simulated_redis import Fault
from tests.protocol.worker_steps import claim, commit
from tests.protocol.world import IDS, RESERVED_S, SenderCrashed, World


@step((0, 1), ("own", "left"), FAULTS, scripts=["take_callbacks", "hold_callbacks", "drop_callbacks"], weight=14)
def send_callbacks(world: World, number: int, which: str, fault: Fault) -> None:
    """A worker sends callbacks: of its own answers, or what others left."""
    worker = world.workers[number]
    members, worker.members = (worker.members, []) if which == "own" else ([], worker.members)
    if members or (which == "left" and world.before.callbacks):
        world.perform("send", lambda _: worker.sender.send_chunk(members), fault)


@step((0, 1), ("before", "after"), scripts=["take_callbacks"], weight=4)
def crash_while_sending(world: World, number: int, when: str) -> None:
    """A worker's process ends before or after it has sent callbacks, and does not delete them."""
    worker = world.workers[number]

    def end() -> None:
        if when == "before":
            world.sends.pop()
        else:
            world.may_send_again.add(world.interrupted)
        raise SenderCrashed

    def call(_: World) -> None:
        world.interruption = end
        with suppress(SenderCrashed):
            worker.sender.send_chunk(worker.members)
        world.interruption = None

    if world.before.callbacks:
        world.perform("send", call)
        world.workers[number] = world.new_worker()


WAITS_MS: Final = {"slow": 31_000, "renewed": 20_000, "abandoned": 31_000, "reused": 4_000_000}
"""How long one sending takes."""


@step((0, 1), ("poll", "own", "requeue", *WAITS_MS), scripts=["take_callbacks"], weight=10)
def send_interrupted(world: World, number: int, what: str) -> None:
    """While a worker sends callbacks, another one does something, time passes, or dead letters are requeued."""
    worker, other = world.workers[number], world.workers[1 - number]

    def end() -> None:
        world.may_send_again.add(world.interrupted)
        raise SenderCrashed

    def meanwhile() -> None:
        sent = world.interrupted
        if what in WAITS_MS:
            if WAITS_MS[what] > RESERVED_S * 1000:
                world.may_send_again.add(sent)
            move_clock(world, WAITS_MS[what])
        if what == "requeue":
            for job_id in IDS:
                requeue(world, job_id, "")
        elif what == "abandoned":  # the other one takes what is left, and its process ends
            world.interruption = end
            with suppress(SenderCrashed):
                world.perform("send", lambda _: other.sender.send_chunk([]))
            world.interruption = None
            world.workers[1 - number] = world.new_worker()
        elif what == "reused":  # the mark has expired, and the id is used for a new job, which is answered
            enqueue(world, sent[0].partition(b"\xff")[0].decode(), "callbacks", "bulk")
            claim(world, 1 - number, 5, "")
            commit(world, 1 - number, "tagged", 5, "")
        else:
            members = other.members if what == "own" else []
            world.perform("send", lambda _: other.sender.send_chunk(members))

    def call(_: World) -> None:
        members, worker.members = worker.members, []
        world.interruption = meanwhile
        worker.sender.send_chunk(members)
        world.interruption = None

    if world.before.callbacks:
        world.perform("send", call)
