"""Option types that several commands use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import click

from shiwu.contract import OF_THE_SET

SPAN_UNITS_S: Final[Mapping[str, float]] = MappingProxyType(
    {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
)
"""Unit of a duration → its seconds."""
_SPAN: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")


def span_s(text: str) -> float | None:
    """The seconds of a duration such as 90s, 15m, 6h, 2d or 1w; None for any other text."""
    found = _SPAN.fullmatch(text)
    return None if found is None else float(found[1]) * SPAN_UNITS_S[found[2]]


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


class Span(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A duration: 90s, 15m, 6h, 2d."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The duration in seconds."""
        if (seconds := span_s(str(value))) is None:
            self.fail(f"expected a duration such as 90s, 15m, 6h or 2d, got {value!r:.80}", param, ctx)
        return seconds
