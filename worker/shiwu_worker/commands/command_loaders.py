"""Loader processes that a command starts for itself: with the limits, the access rules and the sandbox of a worker."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.pool import LoaderPool
from shiwu_worker.loaders.protocol import Loaded, LoadFailed, LoadTask, Recognised
from shiwu_worker.runtime.process import source_environment
from shiwu_worker.service.factories import loader_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.loaders.protocol import LoadResult
    from shiwu_worker.stages.decode.image_spec import ImageSpec

MAX_LOADERS: Final = 4
QUIET_LOADS: Final = 3
"""Deadlines of a load without any result. The pool tries a late image once more and alone, so two are possible."""
READY_S: Final = 60.0
STOP_S: Final = 5.0


class CommandLoaders:
    """A loader pool whose results the caller waits for. Every image is decoded, also one that was loaded before.

    Args:
        slots: images that are loaded at a time.
    """

    def __init__(self, settings: Settings, spec: ImageSpec, *, slots: int) -> None:
        self._timeout_s = QUIET_LOADS * settings.load_timeout_s
        self._done: queue.SimpleQueue[list[LoadResult] | FatalError] = queue.SimpleQueue()
        self._pool = LoaderPool(
            processes=min(settings.loader_count, MAX_LOADERS),
            options=loader_options(settings, spec).model_copy(update={"slots": slots, "known_images": 0}),
            task_timeout_s=settings.load_timeout_s,
            on_fatal=self._done.put,
            environment=source_environment(),
        )
        self._pool.subscribe(self._done.put)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Uint8 (slots, h, w, 3), where the loaders write."""
        return self._pool.pixels

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the processes, and end them.

        Raises:
            FatalError: they are not ready in time.
        """
        self._pool.start()
        try:
            self._pool.wait_ready(READY_S)
            yield
        finally:
            self._pool.close(STOP_S)

    def submit(self, tasks: Sequence[LoadTask]) -> None:
        """Load these images. Never blocks."""
        self._pool.submit(tasks)

    def next_results(self) -> list[Loaded | LoadFailed]:
        """The results of the next images.

        Raises:
            FatalError: none came in time, or the loader processes cannot be kept running.
        """
        try:
            results = self._done.get(timeout=self._timeout_s)
        except queue.Empty:
            text = f"expected an image to be loaded within {self._timeout_s:g} s"
            raise FatalError(ExitCode.LOADERS, text) from None
        if isinstance(results, FatalError):
            raise results
        # With `known_images` 0 the pool takes no other result from a loader.
        return [result for result in results if not isinstance(result, Recognised)]
