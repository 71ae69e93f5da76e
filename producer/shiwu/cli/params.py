"""Option types that several commands use."""

from __future__ import annotations

import math
from typing import Any

import click

from shiwu.contract import OF_THE_SET


class Threshold(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A threshold of scores. The client checks its bounds."""

    name = "number|set"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; 0 for the limits of the label set."""
        try:
            return 0.0 if value == OF_THE_SET else float(value)
        except ValueError:
            self.fail(f"expected a number from 0 to 1, or {OF_THE_SET}, got {value!r:.80}", param, ctx)


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A finite number of seconds."""

    name = "seconds"

    def __init__(self, *, least_s: float = 0.0) -> None:
        self._least_s = least_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds >= self._least_s):
            self.fail(f"expected a number of seconds from {self._least_s:g} on, got {value!r:.80}", param, ctx)
        return seconds
