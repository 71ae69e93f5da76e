"""Two files that probes look at: one exists while the worker is ready, one is touched while it makes progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


class Health:
    """Writes the files; a path of None writes nothing."""

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None, stuck_s: float) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file
        self._stuck_s = stuck_s

    def ready(self, *, is_ready: bool) -> None:
        """Say whether this worker is warm and claims."""
        if self._ready_file is None:
            return
        if is_ready:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)

    def alive_while(self, progress_s: Callable[[], float], busy: Callable[[], bool]) -> Callable[[], None]:
        """A tick that touches the alive file unless held jobs have made no progress for `stuck_s`."""

        def tick() -> None:
            stuck = busy() and time.monotonic() - progress_s() > self._stuck_s
            if self._alive_file is not None and not stuck:
                self._alive_file.touch()

        return tick
