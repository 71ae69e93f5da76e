"""Growing pauses between tries, for clients and workers."""

from __future__ import annotations

from typing import Final

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 2.0


class Backoff:
    """Pauses that double from `first_s` up to `max_s`. Used by one thread."""

    def __init__(self, *, first_s: float = FIRST_PAUSE_S, max_s: float = MAX_PAUSE_S) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._pause_s = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether a pause was taken since the last `reset`."""
        return self._pause_s > 0

    def next_s(self) -> float:
        """The next pause, in seconds."""
        self._pause_s = min(self._max_s, self._pause_s * 2 or self._first_s)
        return self._pause_s

    def reset(self) -> None:
        """Begin again with the shortest pause."""
        self._pause_s = 0.0
