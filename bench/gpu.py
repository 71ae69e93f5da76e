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

SAMPLE_EVERY_MS: Final = 200
FIRST_SAMPLE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """Load of the first GPU over some time; NaN where there is none."""

    busy_percent: float = float("nan")
    """Mean share of the time in which a kernel ran, as the driver counts it."""
    memory_mib: float = float("nan")
    """Peak memory of all processes."""


class Watch:
    """Samples the GPU several times a second, by nvidia-smi."""

    def __init__(self, process: Process | None) -> None:
        self._process = process

    def samples(self) -> int:
        """Return the number of samples until now, for `since`."""
        return len(self._rows())

    def since(self, samples: int = 0) -> Load:
        """Return the load after the first `samples` samples."""
        rows = self._rows()[samples:]
        if not rows:
            return Load()
        return Load(sum(busy for busy, _ in rows) / len(rows), max(memory for _, memory in rows))

    def _rows(self) -> list[tuple[float, float]]:
        if self._process is None:
            return []
        rows = [line.split(",") for line in self._process.log_text().splitlines() if line.count(",") == 1]
        return [(float(busy), float(memory)) for busy, memory in rows if busy.strip().isdigit()]


@contextmanager
def watching(folder: Path, name: str) -> Iterator[Watch]:
    """Sample until the block ends."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Watch(None)
        return
    command = [program, "--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    process = Process(
        [*command, f"-lms={SAMPLE_EVERY_MS}"], name=f"gpu-{name}", folder=folder, env=clean_environment({})
    )
    with process:
        watch = Watch(process)
        # The memory in use before is needed for the difference.
        wait_until(
            lambda: watch.samples() or not process.is_running, timeout_s=FIRST_SAMPLE_TIMEOUT_S, what="nvidia-smi"
        )
        yield watch
