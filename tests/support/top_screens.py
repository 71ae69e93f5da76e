"""Runs the screen of `shiwu top` without a terminal, and reads it as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from textual.pilot import Pilot

from shiwu.top.app import TopApp

SIZE: Final = (80, 24)


def run_screen(app: TopApp, steps: Callable[[Pilot[None]], Awaitable[None]], *, size: tuple[int, int] = SIZE) -> None:
    """Run the app while these steps press keys and look at it."""

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await steps(pilot)

    asyncio.run(run())


def screen_text(app: TopApp) -> str:
    """The top screen as lines of text, without the spaces at their ends."""
    compositor: Any = app.screen._compositor
    return "\n".join("".join(part.text for part in strip).rstrip() for strip in compositor.render_strips())


async def wait_screen(pilot: Pilot[None], *texts: str, timeout_s: float = 15.0) -> str:
    """Wait until the screen shows all of the texts, and return it.

    Raises:
        AssertionError: it does not; with the screen.
    """
    app: Any = pilot.app
    deadline_s = time.monotonic() + timeout_s
    while True:
        await pilot.pause(0.02)
        shown = screen_text(app)
        if all(text in shown for text in texts):
            return shown
        assert time.monotonic() < deadline_s, f"expected {texts} on the screen:\n{shown}"


async def wait_for(pilot: Pilot[None], condition: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it does not; with the screen.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"expected the condition to hold:\n{screen_text(pilot.app)}"  # type: ignore[arg-type]  # a TopApp
        await pilot.pause(0.02)
