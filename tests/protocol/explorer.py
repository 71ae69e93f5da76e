"""Runs schedules: at random, shrunk where one breaks a promise, and breadth first over a small alphabet."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.protocol.openings import OPENINGS
from tests.protocol.simulated_redis import SimulatedRedis
from tests.protocol.snapshot import Snapshot
from tests.protocol.steps import STEPS
from tests.protocol.worker_steps import claim, commit
from tests.protocol.world import Schedule, World, settled

LENGTH: Final = 20
"""Steps of one random schedule."""
OPENED_SHARE: Final = 0.4
"""Of the random schedules, so many begin with an opening."""
MAX_ROUNDS: Final = 12
"""Rounds within which one fair worker must come to the end."""
Letter = tuple[str, tuple[Any, ...]]
SMALL_ALPHABET: Final[Sequence[Letter]] = (
    ("enqueue", ("a", "callbacks", "bulk")),
    ("enqueue", ("a", "expires", "bulk")),
    ("claim", (0, 1, "")),
    ("claim", (1, 1, "lost")),
    ("commit", (0, "tagged", 1, "")),
    ("commit", (1, "failed", 1, "")),
    ("commit_again", (1, "tagged", 0)),
    ("release", (0, "retried", "")),
    ("cancel", ("a", "")),
    ("requeue", ("a", "")),
    ("advance", (61_000,)),
    ("maintain", (0, "")),
    ("sweep", ("maintain", "")),
    ("send_callbacks", (0, "left", "")),
)
"""For the search that reaches every state: one id, two workers."""


class BrokenPromise(AssertionError):
    """A schedule that breaks a promise."""


@dataclass(slots=True)
class Totals:
    """What was run."""

    schedules: int = 0
    steps: int = 0
    states: int = 0
    answers: int = 0
    names: Counter[str] = field(default_factory=Counter)
    """How often each step did something."""


def run(client: SimulatedRedis, schedule: Schedule) -> World:
    """Run one schedule, and then one fair worker to the end.

    Raises:
        AssertionError: a promise is broken.
    """
    world = World(client)
    for name, arguments in schedule.steps:
        STEPS[name].run(world, *arguments)
    settle(world)
    return world


def settle(world: World) -> None:
    """One fair worker with a sweep answers all that waits; nothing is left.

    Raises:
        AssertionError: something is left, or a promise is broken on the way.
    """
    if world.before.foreign:
        # What stands under keys of single ids the operator deletes.
        world.perform("spoil", lambda w: w.client.delete(*w.before.foreign))
    STEPS["advance"].run(world, world.set_back_ms + 1)  # delays wait for a clock that was set back
    fair = world.new_worker()
    world.workers[0] = fair
    for _ in range(MAX_ROUNDS):
        STEPS["advance"].run(world, 61_000)
        STEPS["sweep"].run(world, "maintain", "")
        STEPS["maintain"].run(world, 0, "")
        empty = 0
        while empty < 2:
            claim(world, 0, 5, "")
            empty = 0 if fair.jobs else empty + 1
            commit(world, 0, "tagged", 5, "")
        STEPS["send_callbacks"].run(world, 0, "own", "")
        STEPS["send_callbacks"].run(world, 0, "left", "")
        if settled(world.before):
            break
    left = world.before
    assert settled(left), (
        f"after {MAX_ROUNDS} rounds of a fair worker something is left: places {[place for place, _ in left.places]}, "
        f"leases {left.leases}, delays {left.due}, callbacks {list(left.callbacks_due)}, attempts {left.tried}"
    )
    for job_id in set(world.sent.values()):
        assert world.answers[job_id], f"{job_id} was never answered"


def explore(
    client: SimulatedRedis,
    *,
    seed: int,
    schedules: int | None = None,
    until_s: float | None = None,
    length: int = LENGTH,
    is_shrinking: bool = True,
) -> Totals:
    """Run random schedules, so many or until a time of the monotonic clock.

    Schedule `n` of a seed is the same each time.

    Raises:
        BrokenPromise: with the seed, and the schedule without the steps that are not needed.
    """
    totals = Totals()
    number = 0
    while (schedules is None or number < schedules) and (until_s is None or time.monotonic() < until_s):
        steps: list[Letter] = []
        try:
            world = _walk(client, random.Random(f"{seed}/{number}"), length, steps)
            settle(world)
        except Exception as error:  # border: a defect of any kind is shrunk and shown
            shortest, why = Schedule(tuple(steps)), error
            if is_shrinking:
                shortest, why = shrink(client, shortest, error)
            raise BrokenPromise(f"{why!r}\nseed {seed}, schedule {number}, shrunk:{shortest}") from error
        totals.schedules += 1
        totals.steps += len(steps)
        totals.answers += sum(world.answers.values())
        totals.names.update(name for name, _ in steps)
        number += 1
    return totals


def _walk(client: SimulatedRedis, chance: random.Random, length: int, steps: list[Letter]) -> World:
    """Do so many steps by their weights, with arguments by chance, perhaps after an opening.

    Steps that do nothing are left out.
    """
    world = World(client)
    names = list(STEPS)
    weights = [STEPS[name].weight for name in names]
    for letter in chance.choice(OPENINGS) if chance.random() < OPENED_SHARE else ():
        _step(world, letter, steps)
    length += len(steps)
    while len(steps) < length:
        [name] = chance.choices(names, weights)
        _step(world, (name, tuple(chance.choice(domain) for domain in STEPS[name].domains)), steps)
    return world


def _step(world: World, letter: Letter, steps: list[Letter]) -> None:
    """Do one step and note it, unless it does nothing."""
    name, arguments = letter
    steps.append(letter)
    done = world.done
    STEPS[name].run(world, *arguments)
    if world.done == done:
        steps.pop()


def shrink(client: SimulatedRedis, schedule: Schedule, error: Exception) -> tuple[Schedule, Exception]:
    """The schedule without the steps that it does not need to break a promise."""
    size = max(1, len(schedule.steps) // 2)
    while True:
        at = 0
        while at < len(schedule.steps):
            shorter = Schedule(schedule.steps[:at] + schedule.steps[at + size :])
            try:
                run(client, shorter)
                at += size
            except Exception as found:  # noqa: BLE001 border: a defect of any kind is shrunk and shown
                schedule, error = shorter, found
        if size == 1:
            return schedule, error
        size //= 2


# ------------------------------------------------------------------------------------- breadth first
def breadth_first(
    client: SimulatedRedis,
    alphabet: Sequence[Letter],
    *,
    depth: int,
    states: int | None = None,
    until_s: float | None = None,
) -> Totals:
    """Reach all states within `depth` steps of an alphabet, each once, and settle from each.

    Raises:
        BrokenPromise: with the shortest schedule that breaks a promise.
    """
    totals, seen = Totals(), set[object]()
    waiting: deque[tuple[Letter, ...]] = deque([()])
    while waiting and (until_s is None or time.monotonic() < until_s) and (states is None or len(seen) < states):
        path = waiting.popleft()
        for letter in alphabet:
            schedule = Schedule((*path, letter))
            try:
                world = World(client)
                for name, arguments in schedule.steps:
                    STEPS[name].run(world, *arguments)
                reached = state_of(world)
                if reached in seen:
                    continue
                seen.add(reached)
                settle(world)
            except Exception as error:  # border: a defect of any kind is shown
                raise BrokenPromise(f"{error!r}\nshortest:{schedule}") from error
            totals.schedules += 1
            totals.steps += len(schedule.steps)
            if len(schedule.steps) < depth:
                waiting.append(schedule.steps)
    totals.states = len(seen)
    return totals


def state_of(world: World) -> object:
    """What decides about the future: two states with the same value behave alike."""
    return tuple(_canonical(world.before, world))


def _canonical(now: Snapshot, world: World) -> Iterator[object]:
    number: dict[bytes, str] = {}
    for raw, job_id in world.sent.items():
        number[raw] = f"{job_id}{sum(known.startswith(job_id) for known in number.values())}"
    yield [(key, [number[raw] for raw in raws]) for key, raws in now.lanes.items() if raws].__repr__()
    yield repr(sorted((job_id, one.token, one.attempt, number[one.raw]) for job_id, one in now.claims.items()))
    yield repr(sorted((job_id, end - now.now_ms) for job_id, end in now.leases.items()))
    yield repr(sorted((job_id, end - now.now_ms) for job_id, end in now.due.items()))
    yield repr([number[record.partition(b"|")[2]] for record in now.quarantine])
    yield repr(sorted(now.tried.items(), key=str))
    yield repr(sorted(now.marks.items()))
    yield repr(sorted(now.dead))
    yield repr(sorted((member, end - now.now_ms) for member, end in now.callbacks_due.items()))
    yield repr(sorted(now.pending_answers))
    yield repr(sorted(now.results))
    yield repr(sorted(now.foreign))
    for worker in world.workers:
        yield repr((worker.token, [(job.id, job.attempt, job.generation) for job in worker.jobs], worker.members))
        yield repr([(job.id, job.attempt, job.generation) for job in worker.answered])
