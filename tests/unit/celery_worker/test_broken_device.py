"""The end of a worker whose GPU is lost: jobs are given back, and the exit code survives torch's destructors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shiwu_worker.errors import ExitCode

PROGRAM = """
import atexit, os
from types import SimpleNamespace
from shiwu_worker.celery_worker.worker_app import PipelineBootStep
from shiwu_worker.errors import ExitCode, FatalError
atexit.register(os.abort)  # as destructors of pinned memory do after a lost GPU
step = PipelineBootStep(SimpleNamespace(hostname="worker@host"))
step._service = SimpleNamespace(stop=lambda grace_s: print("released, grace", grace_s))
step._on_fatal(FatalError(ExitCode({code}), "lost"))
step.stop(None)
"""


@pytest.mark.parametrize("code", [ExitCode.DEVICE, ExitCode.CANARY])
def test_lost_device_ends_with_its_exit_code(code: ExitCode) -> None:
    """Not with SIGABRT, after which a launcher would not ask the driver; and the jobs were released before."""
    command = [sys.executable, "-c", PROGRAM.format(code=int(code))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr[-500:]
    assert "released, grace 0.0\n" in done.stdout
