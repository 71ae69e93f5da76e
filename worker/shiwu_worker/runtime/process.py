"""Signals on the exit of a parent process, and the environment variables that loader processes get."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1
_PLAIN_NAMES: Final = re.compile(
    r"PATH|HOME|USER|LOGNAME|TZ|TMPDIR|LANG|LANGUAGE|LC_\w+|VIRTUAL_ENV|PYTHON\w+|LD_LIBRARY_PATH|LD_PRELOAD|"
    r"SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|RES_OPTIONS|LOCALDOMAIN|MALLOC_\w+|GLIBC_TUNABLES"
)
_SOURCE_NAMES: Final = re.compile(r"AWS_\w+|(HTTP|HTTPS|NO|ALL)_PROXY", re.IGNORECASE)


def plain_environment() -> dict[str, str]:
    """The variables that a Python process needs to start and find its files; none of them is a secret."""
    return {name: value for name, value in os.environ.items() if _PLAIN_NAMES.fullmatch(name)}


def source_environment() -> dict[str, str]:
    """The environment variables with credentials and proxies of sources. Only the part that fetches gets them."""
    return {name: value for name, value in os.environ.items() if _SOURCE_NAMES.fullmatch(name)}


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit if the parent has already exited."""
    signal_with_parent(parent, signal.SIGKILL, exit_code=1)


def signal_with_parent(parent: int, number: signal.Signals, *, exit_code: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    Args:
        parent: process id of the parent; if it has already exited, this process exits with `exit_code`.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(exit_code)


def exit_now(code: int) -> NoReturn:
    """End the process after its output was flushed, without running Python's finalisation.

    After a lost GPU, destructors of torch's pinned memory and events abort the process (pytorch issue 178154), and a
    driver that hangs may let them wait forever. The exit code would then be lost.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
