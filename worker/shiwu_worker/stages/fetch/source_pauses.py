"""Remembers which sources asked for a pause (Retry-After), so that other jobs do not ask them before it is over."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Unavailable

MAX_SOURCES: Final = 1024
"""Most remembered sources, because producers name them; the oldest is forgotten first."""


class SourcePauses:
    """The pauses of hosts and buckets, in one loader process. Thread-safe.

    Args:
        longest_s: longest pause; a longer one is cut to this.
        clock: gives monotonic seconds.
    """

    def __init__(self, *, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._longest_s = longest_s
        self._until: OrderedDict[str, tuple[float, ErrorCode]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, source: str) -> None:
        """Raise if the pause of a source is not over.

        Raises:
            Unavailable: with the code of the reply that asked for the pause, and the rest of the pause.
        """
        with self._lock:
            until_s, code = self._until.get(source, (0.0, ErrorCode.SOURCE_THROTTLED))
            left_s = until_s - self._clock()
            if left_s <= 0:
                self._until.pop(source, None)
                return
        text = f"not asked: the source asked for a pause that lasts {left_s:.1f} s more"
        raise Unavailable(code, text, stage=Stage.FETCH, retry_after_s=left_s, is_untried=True)

    def note(self, source: str, reply: Unavailable) -> None:
        """Remember the pause that a reply asks for, if it asks for one."""
        if not reply.retry_after_s or reply.is_untried:
            return
        with self._lock:
            self._until[source] = (self._clock() + min(reply.retry_after_s, self._longest_s), reply.code)
            self._until.move_to_end(source)
            if len(self._until) > MAX_SOURCES:
                self._until.popitem(last=False)
