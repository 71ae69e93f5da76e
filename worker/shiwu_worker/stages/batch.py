"""Waiting pictures → one batch.

There is no timer: when the device is free the next batch is whatever is ready, up to the cap, so batches grow by
themselves behind a busy device and a lone picture never waits for company. A batch that is full leaves at once, so that
the device finds it when it ends the one before.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from shiwu.contract import Lane


class _HasLane(Protocol):
    @property
    def lane(self) -> Lane: ...


T = TypeVar("T", bound=_HasLane)
Reason = Literal["full", "free", "closing"]
"""Why a batch left: it was full, the device was free, or the worker ends."""


class Batcher(Generic[T]):
    """A two-lane waiting room. Thread-safe; holds no more than its users have claimed.

    Args:
        cap: no batch is larger.
        bulk_share: share of the places that waiting bulk items get although interactive ones fill them.
        linger_s: how long a batch that is not full waits for more; 0 sends what is there.
        full: so many, `cap` at most, make a full batch now; None: `cap`.
        fit: how many of so many, `cap` at most, a batch takes at a time; at least one.
        on_leave: told why each batch left, and the batch; must not block.
    """

    def __init__(
        self,
        *,
        cap: int,
        bulk_share: float,
        linger_s: float = 0.0,
        full: Callable[[], int] | None = None,
        fit: Callable[[int], int] = lambda waiting: waiting,
        on_leave: Callable[[Reason, Sequence[T]], None] = lambda *_: None,
    ) -> None:
        self._cap = cap
        self._bulk_share = bulk_share
        self._linger_s = linger_s
        self._full = full or (lambda: cap)
        self._fit = fit
        self._bulk_owed = 0.0
        self._on_leave = on_leave
        self._interactive: deque[T] = deque()
        self._bulk: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._on_device = 0

    def put(self, items: Iterable[T]) -> None:
        """Add items that are ready for the device."""
        with self._changed:
            for item in items:
                (self._interactive if item.lane is Lane.INTERACTIVE else self._bulk).append(item)
            self._changed.notify()

    def take(self, timeout_s: float) -> list[T]:
        """The next batch: interactive first, oldest first in each lane; empty when none came in time or on close."""
        with self._changed:
            if not self._changed.wait_for(self._may_leave, timeout_s):
                return []
            if self._linger_s and self._waiting():
                full_at = time.monotonic() + self._linger_s
                while not self._closed and self._waiting() < self._full() and (left := full_at - time.monotonic()) > 0:
                    self._changed.wait(left)
            full = self._full()
            size = self._fit(min(self._cap, self._waiting()))
            # A share of a small batch is less than one: it grows until it is one, while bulk items wait.
            owed = self._bulk_owed + size * self._bulk_share if self._bulk else 0.0
            least = min(int(owed), len(self._bulk), size)
            urgent = min(size - least, len(self._interactive))
            rest = size - urgent
            self._bulk_owed = max(0.0, owed - rest)
            reason: Reason = "full" if size >= full else "closing" if self._closed else "free"
            batch = [self._interactive.popleft() for _ in range(urgent)] + [self._bulk.popleft() for _ in range(rest)]
        if size:
            self._on_leave(reason, batch)
        return batch

    def batch_started(self) -> None:
        """The device works on a batch; the next one leaves when it is full, or when this one has landed."""
        with self._changed:
            self._on_device += 1

    def batch_done(self) -> None:
        """The device is done with a batch."""
        with self._changed:
            self._on_device -= 1
            self._changed.notify_all()

    def drain(self) -> list[T]:
        """Take everything that waits, of any number, without waiting."""
        with self._changed:
            items = [*self._interactive, *self._bulk]
            self._interactive.clear()
            self._bulk.clear()
            return items

    def close(self) -> None:
        """Wake whoever waits; what is inside can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _may_leave(self) -> bool:
        waiting = self._waiting()
        return self._closed or waiting >= self._full() or (waiting > 0 and not self._on_device)

    def _waiting(self) -> int:
        return len(self._interactive) + len(self._bulk)

    def __len__(self) -> int:
        with self._changed:
            return self._waiting()
