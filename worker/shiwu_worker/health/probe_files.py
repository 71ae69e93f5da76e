"""Files for probes: one exists while the worker is ready, the other is touched while it makes progress."""

from __future__ import annotations

import os
from pathlib import Path


class ProbeFiles:
    """Writes both files. A path of None means no file."""

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file

    def set_ready(self, *, is_ready: bool) -> None:
        """Create or remove the file for readiness."""
        if self._ready_file is None:
            return
        if is_ready:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)

    def touch_alive(self, *, at_s: float | None = None) -> None:
        """Touch the file for liveness: the pipeline made progress now, or at this Unix time."""
        if self._alive_file is None:
            return
        if at_s is None or not self._alive_file.exists():
            self._alive_file.touch()
        if at_s is not None:
            os.utime(self._alive_file, (at_s, at_s))
