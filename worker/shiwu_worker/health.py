"""Two files that probes look at: one exists while the worker is ready, one is touched while it makes progress."""

from __future__ import annotations

from pathlib import Path


class Health:
    """Writes the files; a path of None writes nothing."""

    def __init__(self, *, ready_file: Path | None, alive_file: Path | None) -> None:
        self._ready_file = ready_file
        self._alive_file = alive_file

    def ready(self, *, is_ready: bool) -> None:
        """Say whether this worker is warm and claims."""
        if self._ready_file is None:
            return
        if is_ready:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)

    def alive(self) -> None:
        """Say that the pipeline makes progress."""
        if self._alive_file is not None:
            self._alive_file.touch()
