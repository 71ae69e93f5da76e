"""The process that measures a model alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from tests.support.processes import ROOT, clean_environment

LOGGING_LOAD: Final = """
import structlog
from bench import bare
from shiwu_worker.service import model
model.load_encoder = lambda *_: structlog.get_logger().warning("dtype_refused")
bare.main()
"""


def test_standard_output_has_results_only() -> None:
    """What the model logs while it loads goes to standard error: the benchmark reads each line as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", LOGGING_LOAD],
        cwd=ROOT,
        env=clean_environment({}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    assert "dtype_refused" in done.stderr
