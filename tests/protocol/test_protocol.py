"""Random schedules of the lanes' protocol, and every state within a few steps, on a real server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.protocol.defects import DEFECTS
from tests.protocol.explorer import SMALL_ALPHABET, BrokenPromise, breadth_first, explore, run
from tests.protocol.simulated_redis import SimulatedRedis
from tests.protocol.steps import STEPS
from tests.protocol.world import Schedule

PORTIONS = 4
SCHEDULES = 2000 // PORTIONS
LIMIT_S = 40.0
"""A slow machine runs fewer schedules than that; the last lines of pytest say how many."""
SEED = 20261130
"""The same in each run, so that a change is judged by itself; `make protocol` takes others."""
Ran = Callable[[str, object], None]


@pytest.fixture
def client(redis_url: str) -> Iterator[SimulatedRedis]:
    """A client with the explorer's clock."""
    with SimulatedRedis.from_url(redis_url, socket_timeout=30) as connected:
        yield connected


@pytest.mark.slow
@pytest.mark.parametrize("portion", [0, *(pytest.param(later, marks=pytest.mark.long) for later in range(1, PORTIONS))])
def test_random_schedules_keep_every_promise(client: SimulatedRedis, portion: int, record_property: Ran) -> None:
    """Two thousand schedules of twenty steps; a failure prints its seed and the steps that it needs.

    The first portion does every step, runs every script, and finds the 19 of 20 defects of `defects.py` that all four
    find. `make test-long` runs the others, which differ in nothing but their seed.
    """
    totals = explore(client, seed=SEED + portion, schedules=SCHEDULES, until_s=time.monotonic() + LIMIT_S)
    record_property("ran", f"{totals.schedules} random schedules of the protocol")
    assert totals.schedules >= SCHEDULES // 20
    if totals.schedules == SCHEDULES:
        assert STEPS.keys() - totals.names.keys() == set(), "every step did something"
        scripts = {script for step in STEPS.values() for script in step.scripts}
        assert scripts - client.runs.keys() == set(), "every script ran"


@pytest.mark.slow
def test_all_states_within_a_few_steps_keep_promises(client: SimulatedRedis, record_property: Ran) -> None:
    """Each state is reached once, and from each a fair worker comes to the end."""
    totals = breadth_first(client, SMALL_ALPHABET, depth=6, until_s=time.monotonic() + 8)
    record_property("ran", f"{totals.states} states of the protocol, breadth first")
    assert totals.states > 50


@pytest.mark.parametrize(
    "what",
    [
        "a delayed retry counts as a worker death",
        "late answers of earlier generations count",
        "callbacks of jobs cancelled in their lane are lost",
        "an answered id is answered again",
    ],
)
def test_defects_of_scripts_are_found(client: SimulatedRedis, what: str) -> None:
    """Scripts without one of their guards; `make protocol ARGS=--defects` tries them all."""
    script, old, new = DEFECTS[what]
    client.changes = {script: (old, new)}
    with pytest.raises(BrokenPromise, match=r"shrunk:\n"):
        explore(client, seed=SEED, until_s=time.monotonic() + 60)


def test_a_schedule_can_be_run_again(client: SimulatedRedis) -> None:
    """What a failure prints runs as it stands."""
    steps = (("enqueue", ("a", "plain", "bulk")), ("claim", (0, 1, "lost")), ("advance", (61_000,)))
    assert run(client, Schedule(steps)).answers["a"] == 1


def test_answer_without_its_message_waits_as_long_as_its_mark(client: SimulatedRedis) -> None:
    """The mark lives up to a third longer than it must, and lets the message be dropped all the while."""
    steps = (
        ("write_deadline", ("c",)),
        ("enqueue", ("c", "expires", "bulk")),
        ("advance", (61_000,)),
        ("maintain", (0, "")),
        ("advance", (4_000_000,)),
    )
    assert run(client, Schedule(steps)).answers["c"] == 1
