"""What promtool says of a /metrics page."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support import chart_tools

NEEDS_PROMTOOL = pytest.mark.skipif(
    chart_tools.find("promtool") is None and not os.environ.get("CI"), reason="no promtool: `make chart-tools`"
)
"""In CI they fail without it."""


def check_metrics(text: bytes) -> str:
    """What `promtool check metrics` has against a /metrics page; empty when nothing.

    Raises:
        FileNotFoundError: when there is no promtool.
    """
    program = chart_tools.find("promtool")
    if program is None:
        raise FileNotFoundError("expected promtool: `make chart-tools` installs it")
    done = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    said = (done.stdout + done.stderr).decode()
    return said or (f"exit code {done.returncode}" if done.returncode else "")
