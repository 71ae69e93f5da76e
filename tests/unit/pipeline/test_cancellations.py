"""Which ids the listener passes on, without a server."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.contract import ANSWERED_CHANNEL
from shiwu_worker.pipeline import cancellations as module
from shiwu_worker.pipeline.cancellations import MAX_IDS, POLL_INTERVAL_S, RETRY_PAUSE_S, CancellationListener


class Parts:
    """A listener over a channel with these messages; it is closed once all of them were read."""

    def __init__(self, *messages: bytes | Exception | None) -> None:
        self.messages = list(messages)
        self.channels: list[str] = []
        self.timeouts: list[float] = []
        self.pauses: list[float] = []
        self.passed: list[list[str]] = []
        pubsub = SimpleNamespace(subscribe=self.channels.append, get_message=self._get)
        client: Any = SimpleNamespace(pubsub=lambda ignore_subscribe_messages: nullcontext(pubsub))
        self.listener = CancellationListener(
            client, on_answered_elsewhere=lambda ids: self.passed.append(list(ids)), on_fatal=pytest.fail
        )
        closed: Any = SimpleNamespace(is_set=lambda: not self.messages, wait=self.pauses.append)
        self.listener._closed = closed

    def _get(self, *, timeout: float) -> Any:
        self.timeouts.append(timeout)
        message = self.messages.pop(0) if self.messages else None
        if isinstance(message, Exception):
            raise message
        return None if message is None else {"data": message}


def test_ids_that_came_together_are_passed_on_together() -> None:
    """It waits for the first one only; nothing is passed on where nothing came."""
    parts = Parts(None, b"a", b"b\xff", None, None, b"c", None)
    parts.listener._run()
    assert parts.passed == [["a", "b\N{REPLACEMENT CHARACTER}"], ["c"]]
    assert parts.channels == [ANSWERED_CHANNEL]
    assert parts.timeouts == [POLL_INTERVAL_S, POLL_INTERVAL_S, 0, 0, POLL_INTERVAL_S, POLL_INTERVAL_S, 0]
    assert parts.pauses == []


def test_ids_of_one_call_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of messages reaches the jobs portion by portion."""
    assert MAX_IDS > 1
    monkeypatch.setattr(module, "MAX_IDS", 2)
    parts = Parts(b"a", b"b", b"c", b"d", b"e")
    parts.listener._run()
    assert parts.passed == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("x")])
def test_listener_subscribes_again_after_an_error(error: Exception) -> None:
    """After a pause; what was read before the error is lost, which costs time of the device only."""
    parts = Parts(b"a", None, error, b"b", None)
    parts.listener._run()
    assert parts.passed == [["a"], ["b"]]
    assert parts.channels == [ANSWERED_CHANNEL] * 2
    assert parts.pauses == [RETRY_PAUSE_S]
