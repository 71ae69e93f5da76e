"""Hears which jobs were answered by somebody who does not hold them, so that no device time is spent on these.

What is missed here costs that time and nothing else: an answer counts once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis
import structlog

from shiwu.contract import ANSWERED_CHANNEL
from shiwu_worker.errors import ExitCode, FatalError

log: Any = structlog.get_logger()
HEARD_AT_ONCE: Final = 500
RETRY_S: Final = 1.0
POLL_INTERVAL_S: Final = 0.25


class CancellationListener:
    """Listens from `start` to `close`.

    Args:
        on_ended: gets ids; must not block.
        on_fatal: called when the thread ends by a defect.
    """

    def __init__(
        self, client: redis.Redis, *, on_ended: Callable[[Sequence[str]], None], on_fatal: Callable[[FatalError], None]
    ) -> None:
        self._client = client
        self._on_ended = on_ended
        self._on_fatal = on_fatal
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancellations", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        self._thread.join(timeout=4 * POLL_INTERVAL_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError):  # the heartbeat tells the log
                self._closed.wait(RETRY_S)
            except Exception as error:  # border: a thread that ends by a defect takes the process with it
                log.exception("thread_failed", thread="cancellations")
                self._on_fatal(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))
                return

    def _listen(self) -> None:
        with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis' own
            pubsub.subscribe(ANSWERED_CHANNEL)
            while not self._closed.is_set():
                message = pubsub.get_message(timeout=POLL_INTERVAL_S)
                ids: list[str] = []
                while message is not None and len(ids) < HEARD_AT_ONCE:
                    ids.append(message["data"].decode(errors="replace"))
                    message = pubsub.get_message(timeout=0)
                if ids:
                    self._on_ended(ids)
