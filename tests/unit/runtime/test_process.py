"""The end of a process whose device is lost."""

from __future__ import annotations

import subprocess
import sys

from shiwu_worker.errors import ExitCode


def test_lost_device_leaves_its_exit_code() -> None:
    """Output is flushed, and nothing of Python's finalisation runs: destructors of torch would abort the process."""
    code = (
        "import atexit, os\n"
        "from shiwu_worker.runtime.process import exit_now\n"
        "class Pinned:\n"
        "    def __del__(self): os.abort()\n"
        "held = Pinned()\n"
        "atexit.register(os.abort)\n"
        "print('the last line', end='')\n"
        f"exit_now({int(ExitCode.DEVICE)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (67, "the last line"), done.stderr
