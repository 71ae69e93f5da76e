"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        """Now."""
        return self.now_s
