"""Waiting images → one batch.

There is no timer. When the device is free, the next batch takes what is ready, up to the largest batch size. Batches so
grow while the device is busy, and a single image never waits for others. A full batch leaves immediately, so that the
device finds it when the batch before is done.

While interactive items come, bulk items fill only brief batches, because an interactive item waits for the batch before
its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, Generic, Literal, Protocol, TypeVar

from shiwu.contract import Lane


class _HasLane(Protocol):
    @property
    def lane(self) -> Lane: ...


INTERACTIVE_PAUSE_S: Final = 5.0
"""So long after an interactive item, none is expected any more."""
T = TypeVar("T", bound=_HasLane)
Reason = Literal["full", "free", "closing"]
"""Why a batch left: it was full, the device was free, or the worker is stopping."""


class Batcher(Generic[T]):
    """Collects items of two lanes into batches. Thread-safe; holds no more items than the worker has claimed.

    Args:
        max_size: largest batch size.
        bulk_share: share of a batch that waiting bulk items get even if interactive items could fill it.
        linger_s: how long a batch that is not full waits for more items; 0 sends what is there.
        full_size: returns how many items make a full batch now, up to `max_size`; None for `max_size`.
        brief_size: returns up to which size bulk items fill a batch while interactive items come; None for no limit.
        fit: returns how many of the waiting items, up to `max_size`, the next batch takes; at least one.
        on_leave: called with the reason and the batch when a batch leaves; must not block.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        *,
        max_size: int,
        bulk_share: float,
        linger_s: float = 0.0,
        full_size: Callable[[], int] | None = None,
        brief_size: Callable[[], int] | None = None,
        fit: Callable[[int], int] = lambda waiting: waiting,
        on_leave: Callable[[Reason, Sequence[T]], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_size = max_size
        self._bulk_share = bulk_share
        self._linger_s = linger_s
        self._usual_size = full_size or (lambda: max_size)
        self._brief_size = brief_size
        self._clock = clock
        self._interactive_s = -math.inf
        """When the last interactive item came, on the monotonic clock."""
        self._fit = fit
        self._bulk_owed = 0.0
        self._on_leave = on_leave
        self._interactive: deque[T] = deque()
        self._bulk: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_woken = False
        self._on_device = 0

    def put(self, items: Iterable[T]) -> None:
        """Add items that are ready for the device."""
        interactive = Lane.INTERACTIVE  # once: up to Python 3.11 a member of an enum is found by a call
        with self._changed:
            for item in items:
                (self._interactive if item.lane is interactive else self._bulk).append(item)
            if self._interactive:
                self._interactive_s = self._clock()
            self._changed.notify()

    def take(self, timeout_s: float) -> list[T]:
        """The next batch: interactive first, oldest first in each lane; empty after the timeout, `wake` or `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_woken or self._may_leave(), timeout_s)
            self._is_woken = False
            if not self._may_leave():
                return []
            if self._linger_s and self._waiting():
                full_at = time.monotonic() + self._linger_s
                while (
                    not self._is_closed
                    and self._waiting() < self._full_size()
                    and (left := full_at - time.monotonic()) > 0
                ):
                    self._changed.wait(left)
            reason, batch = self._pop_batch()
        if batch:
            self._on_leave(reason, batch)
        return batch

    def prefer(self, items: Iterable[T]) -> None:
        """Move those of the items that wait in bulk to interactive: interactive items have begun to wait for them."""
        with self._changed:
            for item in items:
                with suppress(ValueError):  # it has left already
                    self._bulk.remove(item)
                    self._interactive.append(item)
            self._interactive_s = self._clock()

    def wake(self) -> None:
        """Let `take` return now, because its caller has other work."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    @property
    def is_idle(self) -> bool:
        """Whether no items wait and the device has no batch."""
        with self._changed:
            return not (self._on_device or self._waiting())

    def batch_started(self) -> None:
        """The device begins a batch; the next one leaves when it is full, or when this one is done."""
        with self._changed:
            self._on_device += 1

    def batch_done(self) -> None:
        """The device is done with a batch."""
        with self._changed:
            self._on_device -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wake the waiting threads; the items that wait can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _pop_batch(self) -> tuple[Reason, list[T]]:
        """Remove the next batch from the lanes. The caller holds the lock."""
        full_size = self._full_size()
        size = self._fit(min(self._max_size, self._brief_limit(), self._waiting()))
        # The bulk share of a small batch is less than one image, so it adds up over batches while bulk items wait.
        bulk_owed = self._bulk_owed + size * self._bulk_share if self._bulk else 0.0
        min_bulk = min(int(bulk_owed), len(self._bulk), size)
        interactive_count = min(size - min_bulk, len(self._interactive))
        bulk_count = size - interactive_count
        self._bulk_owed = max(0.0, bulk_owed - bulk_count)
        reason: Reason = "full" if size >= full_size else "closing" if self._is_closed else "free"
        batch = [self._interactive.popleft() for _ in range(interactive_count)]
        return reason, batch + [self._bulk.popleft() for _ in range(bulk_count)]

    def _may_leave(self) -> bool:
        waiting = self._waiting()
        return self._is_closed or waiting >= self._full_size() or (waiting > 0 and not self._on_device)

    def _brief_limit(self) -> int:
        """The largest batch that bulk items may fill now."""
        if self._brief_size is None or self._clock() - self._interactive_s >= INTERACTIVE_PAUSE_S:
            return self._max_size
        return max(self._brief_size(), len(self._interactive))

    def _full_size(self) -> int:
        """How many items make a full batch now."""
        return min(self._usual_size(), self._brief_limit())

    def _waiting(self) -> int:
        return len(self._interactive) + len(self._bulk)

    def __len__(self) -> int:
        with self._changed:
            return self._waiting()
