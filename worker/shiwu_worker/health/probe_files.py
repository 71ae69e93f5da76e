"""Files for probes: one exists while the worker is ready, the other is touched while it makes progress.

Both may lie in a folder where others may write, such as /tmp. A link there is never followed, because it would let them
choose which file the worker creates or touches.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK, because opening a pipe would wait for its reader."""
_MODE: Final = 0o644


class ProbeFiles:
    """Writes both files. A path of None means no file."""

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file

    def set_ready(self, *, is_ready: bool) -> None:
        """Create or remove the file for readiness.

        Raises:
            OSError: the file cannot be written, or is a link or anything but a file.
        """
        if self._ready_file is None:
            return
        if is_ready:
            _touch(self._ready_file)
        else:
            self._ready_file.unlink(missing_ok=True)  # removes a link itself, not what it names

    def touch_alive(self, *, at_s: float | None = None) -> None:
        """Touch the file for liveness: the pipeline made progress now, or at this Unix time.

        Raises:
            OSError: the file cannot be written, or is a link or anything but a file.
        """
        if self._alive_file is not None:
            _touch(self._alive_file, at_s=at_s)


def is_probe_file(path: Path) -> bool:
    """Whether there is a file of this name, and not a link.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _touch(path: Path, *, at_s: float | None = None) -> None:
    try:
        descriptor = os.open(path, _FLAGS, _MODE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_a_file(path, "a link") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_a_file(path, "something else")
        os.utime(descriptor, None if at_s is None else (at_s, at_s))
    finally:
        os.close(descriptor)


def _not_a_file(path: Path, found: str) -> OSError:
    return OSError(errno.ELOOP, f"expected a file of this worker, got {found}; remove it", str(path))
