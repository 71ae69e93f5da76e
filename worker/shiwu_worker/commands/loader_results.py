"""Reads the results of loader processes that a command has started for itself."""

from __future__ import annotations

import queue

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.protocol import LoadResult

Results = queue.SimpleQueue[list[LoadResult] | FatalError]
"""Where a pool puts its results, and the error that ends it."""


def next_results(done: Results, *, timeout_s: float) -> list[LoadResult]:
    """The results of the next images.

    Raises:
        FatalError: none came within `timeout_s`, or the loader processes cannot be kept running.
    """
    try:
        results = done.get(timeout=timeout_s)
    except queue.Empty:
        raise FatalError(ExitCode.LOADERS, f"expected an image to be loaded within {timeout_s:g} s") from None
    if isinstance(results, FatalError):
        raise results
    return results
