"""The alphabet of schedules: each step with the values of its arguments and the scripts that it runs.

A step names ids, workers and outcomes by plain values, and does nothing where there is nothing to do, so that any
part of a schedule is a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Final

from tests.protocol import callback_steps, client_steps, maintenance_steps, outside_steps, worker_steps
from tests.protocol.alphabet import ALL, Step

STEPS: Final[dict[str, Step]] = {
    name: found
    for module in (client_steps, worker_steps, maintenance_steps, callback_steps, outside_steps)
    for name, found in ALL.items()
    if found.run.__module__ == module.__name__
}
"""Every step, in an order that does not depend on which module was imported first: a seed repeats a schedule."""


def letters(names: Sequence[str] = ()) -> list[tuple[str, tuple[Any, ...]]]:
    """Every step with every value of its arguments."""
    return [
        (found.name, arguments)
        for found in STEPS.values()
        if not names or found.name in names
        for arguments in dict.fromkeys(product(*found.domains))
    ]
