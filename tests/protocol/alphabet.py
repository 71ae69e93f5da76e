"""How a step is added to the alphabet of schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.protocol.simulated_redis import Fault

FAULTS: Final[Sequence[Fault]] = ("", "", "", "", "lost", "unsent")
"""For callers that are told of a lost reply."""
REPEATS: Final[Sequence[Fault]] = ("", "", "", "", "lost", "repeated")
"""For clients that repeat a command by themselves."""


@dataclass(frozen=True, slots=True)
class Step:
    """One letter of the alphabet."""

    name: str
    run: Callable[..., None]
    domains: Sequence[Sequence[Any]]
    scripts: Sequence[str]
    """Files of the scripts that it runs."""
    weight: int


ALL: Final[dict[str, Step]] = {}
"""Every step by its name."""


def step(*domains: Sequence[Any], scripts: Sequence[str] = (), weight: int = 4) -> Callable[..., Any]:
    """Add a function to the alphabet; each domain has the values of one argument."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        name = run.__name__
        ALL[name] = Step(name, run, domains, [f"{script}.lua" for script in scripts], weight)
        return run

    return add
