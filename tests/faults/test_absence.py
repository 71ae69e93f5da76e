"""Redis that is swallowed or away for a while: the worker neither ends nor spins, and goes on soon after."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import Fleet
from tests.support import drill
from tests.support.family import cpu_s, family
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

HOLE_S = 8.0
AWAY_S = 20.0
SETTLED_S = 4.0
"""From the loss of Redis until what was in hand is encoded and waits for its commit."""


def let_pass(seconds: float) -> float:
    """Let so much time pass; return what has passed."""
    began_s = time.monotonic()
    wait_until(lambda: time.monotonic() - began_s >= seconds, timeout_s=seconds + 5, every_s=0.1)
    return time.monotonic() - began_s


@pytest.mark.slow
def test_a_black_hole_that_is_healed(fleet: Fleet, far: WorkerProcess) -> None:
    """Both ways swallow everything and no connection is reset: the work goes on within 10 s."""
    ids = fleet.send(300, prefix="hole")
    wait_until(lambda: drill.answered(fleet.client) > 50, timeout_s=30)
    fleet.proxy.black_hole()
    let_pass(HOLE_S)
    before = drill.answered(fleet.client)
    assert before < len(ids)
    fleet.proxy.heal()
    wait_until(lambda: drill.answered(fleet.client) > before, timeout_s=10)
    assert fleet.counted(ids).statuses == {"tagged": len(ids)}
    assert far.is_running


@pytest.mark.slow
def test_redis_is_away_for_long(fleet: Fleet, far: WorkerProcess) -> None:
    """Every connection is refused: the process lives, uses less than a twentieth of a core, and goes on afterwards."""
    ids = fleet.send(300, prefix="away")
    wait_until(lambda: drill.answered(fleet.client) > 50, timeout_s=30)
    fleet.proxy.refuse()
    let_pass(SETTLED_S)
    used_s = cpu_s(family(far.pid))
    passed_s = let_pass(AWAY_S - SETTLED_S)
    used_s = cpu_s(family(far.pid)) - used_s
    assert far.is_running
    assert used_s < 0.05 * passed_s, f"{used_s:.2f} s of CPU in {passed_s:.1f} s"
    before = drill.answered(fleet.client)
    fleet.proxy.heal()
    wait_until(lambda: drill.answered(fleet.client) > before, timeout_s=10)
    assert fleet.counted(ids).statuses == {"tagged": len(ids)}
    assert far.is_running
