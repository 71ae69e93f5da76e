"""The fuzz targets run: a second of each on every day, more by `make fuzz`."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.engine import run
from tests.fuzz.targets import TARGETS, Target

SEED = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6) if os.environ.get("CI") else 20261125


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("start", [SEED])
def test_each_target_survives_a_second_of_inputs(name: str, start: int) -> None:
    """Nothing but what is promised comes out; the seed stands in the test's name."""
    assert run(TARGETS[name], seconds=1.0, start=start) > 0


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    """What fuzzing begins with passes."""
    for data in TARGETS[name].seeds():
        TARGETS[name].check(data)


def test_a_failing_target_is_found() -> None:
    """A target with a hole is reported."""

    def check(data: bytes) -> None:
        assert not data.startswith(b"\xff")

    with pytest.raises(AssertionError):
        run(Target("hole", lambda: [bytes(8)], check), seconds=20.0, start=1)
