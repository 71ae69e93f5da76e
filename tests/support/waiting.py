"""Waiting for a condition with a deadline: the only way in which tests, demo and benchmarks let time pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

least_s = 0.0
"""No deadline is shorter. Tests set it: a busy machine needs longer for a step that usually takes milliseconds."""


def wait_until(condition: Callable[[], T], *, timeout_s: float, what: str = "", every_s: float = 0.02) -> T:
    """Ask `condition` again and again until it is true, and return what it said.

    Raises:
        TimeoutError: naming `what` was waited for and what the condition said last.
    """
    timeout_s = max(timeout_s, least_s)
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        said = condition()
        if said:
            return said
        if time.monotonic() >= deadline_s:
            name = what or getattr(condition, "__name__", "the condition")
            raise TimeoutError(f"expected {name} within {timeout_s} s, it said {said!r:.200} last")
        pause.wait(every_s)
