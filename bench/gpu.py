"""How busy a GPU is, and how much of its memory is taken, while something runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.processes import Process, clean_environment
from tests.support.waiting import wait_until

EVERY_MS: Final = 200
FIRST_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """Of the first GPU, over a stretch; not numbers where there is none."""

    busy_percent: float = float("nan")
    """Mean share of the time in which a kernel ran, as the driver counts it."""
    memory_mib: float = float("nan")
    """The most that was taken, by all processes."""


class Watch:
    """Looks at the GPU several times a second, by nvidia-smi."""

    def __init__(self, process: Process | None) -> None:
        self._process = process

    def looks(self) -> int:
        """How often it has looked until now: the begin of a stretch."""
        return len(self._rows())

    def since(self, looks: int = 0) -> Load:
        """What was seen after so many looks."""
        seen = self._rows()[looks:]
        if not seen:
            return Load()
        return Load(sum(busy for busy, _ in seen) / len(seen), max(memory for _, memory in seen))

    def _rows(self) -> list[tuple[float, float]]:
        if self._process is None:
            return []
        rows = [line.split(",") for line in self._process.log_text().splitlines() if line.count(",") == 1]
        return [(float(busy), float(memory)) for busy, memory in rows if busy.strip().isdigit()]


@contextmanager
def watching(folder: Path, name: str) -> Iterator[Watch]:
    """Watch until the block ends."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Watch(None)
        return
    command = [program, "--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    process = Process([*command, f"-lms={EVERY_MS}"], name=f"gpu-{name}", folder=folder, env=clean_environment({}))
    with process:
        watch = Watch(process)
        # What was taken before is part of the answer.
        wait_until(lambda: watch.looks() or not process.is_running, timeout_s=FIRST_S, what="nvidia-smi")
        yield watch
