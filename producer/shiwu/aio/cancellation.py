"""Raises cancellations that redis-py has swallowed.

redis-py sends by `asyncio.wait_for`, which in Python 3.11 returns as if nothing had happened where its task is
cancelled while the call ends (python/cpython#86296). The task would then wait for its next reply as long as it may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancellable() -> Iterator[None]:
    """A block with calls of redis-py, at whose end a cancellation that came meanwhile is raised.

    Raises:
        asyncio.CancelledError: the task was cancelled in the block; also where its calls have ended as usual.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    yield
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
