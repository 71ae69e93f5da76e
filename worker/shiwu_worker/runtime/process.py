"""Processes: ending with the parent, and the environment that a loader process gets."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from typing import Final

PR_SET_PDEATHSIG: Final = 1


_PLAIN_NAMES: Final = re.compile(
    r"PATH|HOME|USER|LOGNAME|TZ|TMPDIR|LANG|LANGUAGE|LC_\w+|VIRTUAL_ENV|PYTHON\w+|LD_LIBRARY_PATH|LD_PRELOAD|"
    r"SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|RES_OPTIONS|LOCALDOMAIN|MALLOC_\w+|GLIBC_TUNABLES"
)


_SOURCE_NAMES: Final = re.compile(r"AWS_\w+|(HTTP|HTTPS|NO|ALL)_PROXY", re.IGNORECASE)


def source_environment() -> dict[str, str]:
    """The variables that S3's chain of credentials may need: for the part that fetches, and for nobody else."""
    return {name: value for name, value in os.environ.items() if _SOURCE_NAMES.fullmatch(name)}


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends; end at once where that process is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
