"""Which tests may be skipped in CI, and why a machine of CI cannot run them; any other skip fails the run there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ALLOWED_IN_CI: Final[Mapping[str, int]] = {
    # A container that is itself run by gVisor has no filters of system calls.
    "this kernel does not allow filters of system calls": 1,
    # Debian's node and npm are 500 MB with what they need; `make test` elsewhere takes the browser from npm.
    "no Chromium in .venv/chromium": 21,
    # Four databases whose libraries are some 500 MB; see the docstring of the test.
    "no vector database for the recipes of docs/vectors.md": 4,
    # With `-n 0`.
    "not run side by side": 1,
}
"""How a reason begins, and how many tests may have it."""


def unexpected_skips(reasons: Mapping[str, int]) -> list[str]:
    """What is skipped although a machine of CI can run it, as lines of text.

    Args:
        reasons: reason of skipped tests → how many were skipped for it.
    """
    found = []
    for reason, count in reasons.items():
        most = next((most for begin, most in ALLOWED_IN_CI.items() if reason.startswith(begin)), 0)
        if count > most:
            found.append(f"{count} tests were skipped, at most {most} may be in CI: {reason}")
    return found
