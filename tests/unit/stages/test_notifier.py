"""The notifier of the lanes, without a server: whom it watches, when it asks, and whom it wakes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.contract import Lane
from shiwu_worker.stages.claim.notifier import LaneNotifier

KEY = Lane.BULK.keys[2]


class Parts:
    """A notifier over a server that gives these replies, and whose loop ends after them."""

    def __init__(self, *replies: Any, is_idle: tuple[bool, ...] = ()) -> None:
        self.replies = list(replies)
        self.asked: list[Any] = []
        self.pauses: list[float] = []
        self.idle_waits: list[float] = []
        self.is_idle = list(is_idle) or [True] * len(replies)
        client: Any = SimpleNamespace(blmove=self._move)
        self.notifier = LaneNotifier(client, block_s=5.0)
        closed: Any = SimpleNamespace(is_set=lambda: not self.is_idle, wait=self.pauses.append)
        self.notifier._closed = closed

    def _move(self, *keys: str, **options: Any) -> Any:
        self.asked.append((keys, options))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _wait(self, timeout_s: float) -> bool:
        self.idle_waits.append(timeout_s)
        return self.is_idle.pop(0)

    def watch(self) -> bool:
        """Run the loop of one key; whether the waiting thread was woken."""
        idle: Any = SimpleNamespace(wait=self._wait)
        self.notifier._watch(KEY, idle)
        return self.notifier._notified.is_set()


@pytest.mark.parametrize(("lanes", "count"), [(tuple(Lane), 8), ((Lane.BULK,), 4), ((), 0)])
def test_each_key_of_the_served_lanes_is_watched(lanes: tuple[Lane, ...], count: int) -> None:
    """By a thread with a name of its own, which runs once the notifier is started."""
    client: Any = SimpleNamespace(blmove=lambda *_, **__: None)
    notifier = LaneNotifier(client, lanes=lanes)
    assert len({thread.name for thread in notifier._threads}) == len(notifier._threads) == count
    assert not any(thread.is_alive for thread in notifier._threads)
    notifier.start()
    assert all(thread.is_alive for thread in notifier._threads)
    notifier.close()
    assert all(thread.join(10.0) for thread in notifier._threads)


def test_message_wakes_the_worker() -> None:
    """It is moved to where it was, and the key is left alone for a moment."""
    parts = Parts(b"message")
    assert parts.watch()
    assert parts.asked == [((KEY, KEY), {"timeout": 5, "src": "RIGHT", "dest": "RIGHT"})]
    assert parts.pauses == [0.005]


def test_empty_lane_is_watched_again() -> None:
    """Without a pause: the server has waited."""
    parts = Parts(None, None)
    assert not parts.watch()
    assert (len(parts.asked), parts.pauses) == (2, [])


def test_busy_worker_asks_nothing() -> None:
    """It looks once a second whether the worker has become idle."""
    parts = Parts(None, is_idle=(False, False, True))
    assert not parts.watch()
    assert (len(parts.asked), parts.idle_waits) == (1, [1.0] * 3)


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), redis.ResponseError("WRONGTYPE"), OSError("x")])
def test_error_of_redis_is_waited_for(error: Exception) -> None:
    """The claim loop logs it; the lane is watched again."""
    parts = Parts(error, b"message")
    assert parts.watch()
    assert parts.pauses == [1.0, 0.005]


def test_wait_watches_the_named_lanes_only() -> None:
    """While it waits. A notification between two waits ends the second, and only that."""
    client: Any = SimpleNamespace()
    notifier = LaneNotifier(client)
    seen: list[tuple[bool, ...]] = []

    def wait(timeout_s: float) -> bool:
        seen.append((timeout_s == 7.0, *(notifier._idle[lane].is_set() for lane in Lane)))
        return True

    notified = notifier._notified
    notifier._notified = SimpleNamespace(wait=wait, clear=notified.clear)  # type: ignore[assignment]  # all it uses
    assert notifier.wait(7.0, lanes=(Lane.BULK,))
    assert notifier.wait(7.0)
    assert seen == [(True, False, True), (True, True, True)]
    assert not any(idle.is_set() for idle in notifier._idle.values())
    notifier._notified = notified
    notifier.notify()
    assert notifier.wait(0.0)
    assert not notifier.wait(0.0)


def test_closed_notifier_waits_for_nothing() -> None:
    """And wakes the thread that waits."""
    client: Any = SimpleNamespace()
    notifier = LaneNotifier(client)
    notifier.close()
    assert notifier._notified.is_set()
    assert all(idle.is_set() for idle in notifier._idle.values())
    assert not notifier.wait(60.0)
