"""Threads of a worker process: each runs one loop and reports the failure that ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()


class ServiceThread:
    """A daemon thread that runs `loop` once. Its methods may be called from any other thread.

    Args:
        name: of the thread, in logs and in the reasons of a failed liveness probe.
        loop: returns soon after `stop` was called; it has no wait without a bound.
        on_fatal: called on the thread when `loop` raises. A FatalError is passed on; any other error is logged and
            passed on as ExitCode.INTERNAL. None: the error is logged, and the process goes on without the thread.
        stop: asks `loop` to return; must not block.
    """

    def __init__(
        self,
        name: str,
        loop: Callable[[], None],
        *,
        on_fatal: Callable[[FatalError], None] | None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._loop = loop
        self._on_fatal = on_fatal
        self._stop = stop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread was started and has not ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; False when it still runs after `timeout_s`."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def ask_to_end(self) -> None:
        """Ask the loop to return, without waiting for it."""
        self._stop()

    def close(self, timeout_s: float) -> bool:
        """Ask the loop to return and wait for it; False when it still runs after `timeout_s`."""
        self._stop()
        return self.join(timeout_s)

    def _run(self) -> None:
        try:
            self._loop()
        except FatalError as error:
            self._fail(error)
        except Exception as error:  # border: a process without one of its threads must not go on unnoticed
            log.exception("thread_failed", thread=self.name)
            self._fail(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))

    def _fail(self, error: FatalError) -> None:
        if self._on_fatal is not None:
            self._on_fatal(error)
