"""A process that has loaded the libraries, and runs tests in forks of itself: importing torch takes seconds of a core.

Each fork gets a copy of the packages in which one fault may be. What a test leaves running ends with its fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("producer", "worker")
LIBRARIES: Final = (
    "torch",
    "transformers",
    "numpy",
    "PIL.Image",
    "boto3",
    "celery",
    "kombu",
    "redis",
    "pydantic_settings",
    "msgspec",
    "structlog",
    "rich",
    "click",
    "pytest",
    "prometheus_client",
)
SELECTED: Final = "not slow and not long and not gpu"
PR_SET_CHILD_SUBREAPER: Final = 36
POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """How one run of tests ended."""

    exit_code: int | None
    """pytest's exit code; None: it ran past its limit, and was ended."""
    seconds: float
    log: str


class Zygote:
    """Runs tests against a copy of the packages, one run at a time.

    Args:
        folder: for the copy and the log; must be empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        for package in PACKAGES:
            # With the compiled files: times of change are kept, so they stay valid for all but the changed module.
            shutil.copytree(ROOT / package, folder / package, symlinks=True)
        for name in LIBRARIES:
            importlib.import_module(name)
        # Servers that a test starts get this process as their parent when the fork ends.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(
        self,
        tests: Sequence[str],
        *,
        limit_s: float,
        module: str | None = None,
        source: str = "",
        is_first_only: bool = True,
    ) -> Run:
        """Run tests, with `source` in the place of a module.

        Args:
            is_first_only: end with the first test that fails.
        """
        options = ["-x"] if is_first_only else []
        if module is None:
            return self._run([*options, *tests], limit_s)
        place = self._folder / module
        place.write_text(source, encoding="utf-8")
        try:
            return self._run([*options, *tests], limit_s)
        finally:
            shutil.copy2(ROOT / module, place)

    def _run(self, arguments: Sequence[str], limit_s: float) -> Run:
        from_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._become_pytest(arguments)
        exit_code: int | None = None
        try:
            while time.monotonic() - from_s < limit_s:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    exit_code = os.waitstatus_to_exitcode(status)
                    break
                time.sleep(POLL_S)  # a forked process has no wait with a time-out
        finally:
            _end_children()
        return Run(exit_code, time.monotonic() - from_s, self._log.read_text(encoding="utf-8", errors="replace"))

    def _become_pytest(self, arguments: Sequence[str]) -> None:
        """In the fork: run pytest, and never return."""
        try:
            log = os.open(self._log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            places = [str(self._folder / package) for package in PACKAGES]
            # Workers that a test starts find the copy by the variable, and this process by its path.
            os.environ |= {"PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.dont_write_bytecode = True
            sys.path[:0] = [*places, str(ROOT)]
            sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
            os.chdir(ROOT)
            import pytest  # noqa: PLC0415 it is loaded already

            # One of the libraries loads a plugin of pytest.
            options = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
            options += ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=60", "-m", SELECTED]
            code = int(pytest.main([*options, f"--basetemp={self._folder / 'tmp'}", *arguments]))
            sys.stdout.flush()
            os._exit(code)
        except BaseException:  # noqa: BLE001 border: a fork must not return into the code of its parent
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)


def _end_children() -> None:
    """End all processes below this one, also those whose parents have ended."""
    me = os.getpid()
    while True:
        children = Path(f"/proc/{me}/task/{me}/children").read_text(encoding="ascii").split()
        if not children:
            return
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
