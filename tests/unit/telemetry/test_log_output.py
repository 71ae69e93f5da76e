"""Log lines: a stream that is closed, full or has no reader costs no job, and a file may be moved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiwu_worker.telemetry.log_output import POLL_EVERY_S, LogOutput
from tests.support.clock import Clock
from tests.support.processes import clean_environment

WRITE = """
import os, sys
from shiwu_worker.telemetry import logs
import structlog
logs.set_up(level="info", form="{form}")
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
for number in range(3):
    structlog.get_logger().info("said", number=number)
os.write({result_fd}, (str(min(held) > 2) + " " + str(sys.stderr is not None)).encode())
"""


@pytest.mark.parametrize("form", ["json", "console", "auto"])
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- 1>&-", "0<&- 1>&- 2>&-"])
def test_log_to_an_unwritable_standard_error_continues(redirection: str, form: str, tmp_path: Path) -> None:
    """Logging continues, and no file opened later gets the number of standard error."""
    read, write = os.pipe()
    code = WRITE.format(form=form, result_fd=write)
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, env=clean_environment({}), pass_fds=(write,), timeout=60, check=False, cwd=tmp_path
        )
    finally:
        os.close(write)
    with os.fdopen(read) as result:
        assert (done.returncode, result.read()) == (0, "True True")


def test_lost_log_lines_are_counted(tmp_path: Path) -> None:
    """The first line that can be written again has the number of missing lines."""
    clock = Clock()
    path = tmp_path / "folder" / "log"
    output = LogOutput(str(path), clock=clock.monotonic)
    output.write(b"one\n")
    output.write("two\n")
    path.parent.mkdir()
    output.write("three \udcff\n")
    output.write("four\n")
    output.close()
    lines = path.read_text().splitlines()
    assert lines == [
        '{"event": "log_lines_lost", "level": "warning", "lines": 2}',
        "three \\udcff",
        "four",
    ]


def test_log_file_that_was_moved_is_created_again(tmp_path: Path) -> None:
    """Lines follow the name, not the file."""
    clock = Clock()
    path = tmp_path / "log"
    output = LogOutput(str(path), clock=clock.monotonic)
    output.write(b"old\n")
    path.rename(tmp_path / "moved")
    clock.now_s += POLL_EVERY_S
    output.write(b"new\n")
    output.close()
    assert (path.read_bytes(), (tmp_path / "moved").read_bytes()) == (b"new\n", b"old\n")
