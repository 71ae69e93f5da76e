"""How much slower than an idle machine this one was while something ran, because other programs had its cores."""

from __future__ import annotations

import threading
import time
from typing import Final, Self

WORK_S: Final = 0.02
"""CPU time of one sample."""
PAUSE_S: Final = 0.2


class Slowness:
    """Samples while it is entered how long a little work takes. `factor` may be read at any time."""

    def __init__(self) -> None:
        self._factors: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="slowness", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def factor(self) -> float:
        """Elapsed time divided by CPU time in the slowest tenth of the samples; at least 1."""
        ordered = sorted(self._factors) or [1.0]
        return max(1.0, ordered[len(ordered) * 9 // 10])

    def _sample(self) -> None:
        while not self._ended.is_set():
            from_s, cpu_from_s = time.monotonic(), time.thread_time()
            while time.thread_time() - cpu_from_s < WORK_S:
                pass
            self._factors.append((time.monotonic() - from_s) / (time.thread_time() - cpu_from_s))
            self._ended.wait(PAUSE_S)
