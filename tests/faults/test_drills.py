"""Every drill in its short form: fixed seed and, in CI, one that nobody has seen before. The promise must hold."""

from __future__ import annotations

import os
import random
from dataclasses import asdict

import pytest
from drill.__main__ import run
from drill.catalogue import DRILLS

FIXED = 20261123
SEED = random.SystemRandom().randrange(10**6) if os.environ.get("CI") else FIXED
"""One run takes one of the two: CI the random one, everybody else the fixed one; the duplicates drill takes both."""


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_the_promise_holds(name: str) -> None:
    """Enqueued = answered, each once, in time."""
    outcome = run(DRILLS[name], seed=SEED, short=True, minutes=0.2)
    assert outcome.is_kept, f"seed {SEED}: {asdict(outcome)}"


@pytest.mark.slow
def test_the_promise_holds_with_the_fixed_seed() -> None:
    """The cheapest drill, with the seed that everybody has."""
    outcome = run(DRILLS["duplicates"], seed=FIXED, short=True)
    assert outcome.is_kept, f"seed {FIXED}: {asdict(outcome)}"
