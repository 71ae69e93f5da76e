"""Cancellation listener: receives ids of jobs that another process answered, so that no device time is spent on them.

A missed message wastes that time and has no other effect, because only the first answer of a job counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import redis

from shiwu.contract import ANSWERED_CHANNEL
from shiwu_worker.errors import FatalError
from shiwu_worker.runtime.threads import ServiceThread

MAX_IDS: Final = 500
"""Ids that are passed on in one call."""
RETRY_PAUSE_S: Final = 1.0
POLL_INTERVAL_S: Final = 0.25
CLOSE_TIMEOUT_S: Final = 4 * POLL_INTERVAL_S


class CancellationListener:
    """A thread that listens from `start` to `close`.

    Args:
        on_answered_elsewhere: gets job ids, on the thread; must not block.
        on_fatal: called when the thread ends by a defect.
        shard: index of the shard of the client; stands in the name of the thread.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        on_answered_elsewhere: Callable[[Sequence[str]], None],
        on_fatal: Callable[[FatalError], None],
        shard: int = 0,
    ) -> None:
        self._client = client
        self._on_answered_elsewhere = on_answered_elsewhere
        self._closed = threading.Event()
        self.thread = ServiceThread(
            f"cancellations-{shard}" if shard else "cancellations", self._run, on_fatal=on_fatal, stop=self._closed.set
        )

    def start(self) -> None:
        """Start listening."""
        self.thread.start()

    def close(self) -> None:
        """Stop listening."""
        self.thread.close(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError):  # the heartbeat logs that Redis is unavailable
                self._closed.wait(RETRY_PAUSE_S)

    def _listen(self) -> None:
        with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis' own
            pubsub.subscribe(ANSWERED_CHANNEL)
            while not self._closed.is_set():
                ids: list[str] = []
                while len(ids) < MAX_IDS:
                    message = pubsub.get_message(timeout=0 if ids else POLL_INTERVAL_S)
                    if message is None:
                        break
                    ids.append(message["data"].decode(errors="replace"))
                if ids:
                    self._on_answered_elsewhere(ids)
