"""Files for probes: one exists while the worker is ready, the other is touched while it makes progress.

Both may lie in a folder where others may write, such as /tmp. A link there is never followed, because it would let them
choose which file the worker creates or touches.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK, because opening a pipe would wait for its reader."""
_MODE: Final = 0o644


class ProbeFiles:
    """Writes both files. A path of None means no file.

    A file that cannot be written is logged, once until a write succeeds, and changes nothing else: a worker goes on
    renewing leases and drains whole, whatever became of the folder of its probe files.
    """

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file
        self._is_ready = False
        self._failed: set[Path] = set()

    def set_ready(self, *, is_ready: bool) -> bool:
        """Create or remove the file for readiness; False where that failed."""
        self._is_ready = is_ready
        path = self._ready_file
        if path is None:
            return True
        # `unlink` removes a link itself, not what it names.
        return self._write(path, (lambda: _touch(path)) if is_ready else (lambda: path.unlink(missing_ok=True)))

    def touch_alive(self, *, at_s: float | None = None) -> None:
        """Touch the file for liveness: the pipeline made progress now, or at this Unix time.

        Also tries again to create or remove the file for readiness where that failed.
        """
        if self._ready_file in self._failed:
            self.set_ready(is_ready=self._is_ready)
        path = self._alive_file
        if path is not None:
            self._write(path, lambda: _touch(path, at_s=at_s))

    def _write(self, path: Path, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            if path not in self._failed:
                self._failed.add(path)
                log.error(
                    "probe_file_failed",
                    path=str(path),
                    error=str(error)[:300],
                    meaning="probes that read this file see an old state; the worker goes on",
                )
            return False
        self._failed.discard(path)
        return True


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
