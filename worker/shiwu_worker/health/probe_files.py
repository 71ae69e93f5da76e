"""Two files that probes look at: one exists while the worker is ready, one is touched while it makes progress."""

from __future__ import annotations

import os
from pathlib import Path


class ProbeFiles:
    """Writes the files; a path of None writes nothing."""

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file

    def set_ready(self, *, is_ready: bool) -> None:
        """Say whether this worker is warm and claims."""
        if self._ready_file is None:
            return
        if is_ready:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)

    def touch_alive(self, *, at_s: float | None = None) -> None:
        """Say that the pipeline made progress, now or at this Unix time."""
        if self._alive_file is None:
            return
        if at_s is None or not self._alive_file.exists():
            self._alive_file.touch()
        if at_s is not None:
            os.utime(self._alive_file, (at_s, at_s))
