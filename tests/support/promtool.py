"""promtool, from Debian's package `prometheus`, where the machine has it or the chart's tests have put it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT

KEPT = ROOT / ".venv" / "chart-tools" / "promtool"


def find() -> str | None:
    """The program's path."""
    return str(KEPT) if KEPT.exists() else shutil.which("promtool")


NEEDS_PROMTOOL = pytest.mark.skipif(
    find() is None and not os.environ.get("CI"), reason="no promtool: apt-get install prometheus"
)
"""In CI they fail without it."""


def check_metrics(text: bytes) -> str:
    """What `promtool check metrics` has against a /metrics page; empty when nothing.

    Raises:
        FileNotFoundError: when there is no promtool.
    """
    program = find()
    if program is None:
        raise FileNotFoundError("expected promtool: apt-get install prometheus")
    done = subprocess.run([Path(program), "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    said = (done.stdout + done.stderr).decode()
    return said or (f"exit code {done.returncode}" if done.returncode else "")
