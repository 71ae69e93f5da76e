"""Pauses between tries, and how an unavailable Redis is logged."""

from __future__ import annotations

import threading

from redis import AuthenticationError, ConnectionError, RedisError
from structlog.testing import capture_logs

from shiwu.broker.backoff import MAX_PAUSE_S
from shiwu_worker.runtime.backoff import LOG_INTERVAL_S, RedisBackoff
from tests.support.clock import Clock

UNAVAILABLE = ConnectionError("Connection refused")
REFUSED = AuthenticationError("invalid username-password pair")


class Pauses(threading.Event):
    """A stop event that records how long it is waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Record the pause."""
        self.waited_s.append(timeout)
        return self.is_set()


def test_redis_backoff_pauses_grow_and_stay_bounded() -> None:
    """Each pause is reported with its error; a success makes them short again."""
    pauses, reported = Pauses(), list[RedisError]()
    backoff = RedisBackoff("claim", on_wait=reported.append, clock=Clock().monotonic)
    for _ in range(7):
        backoff.wait(UNAVAILABLE, pauses)
    assert pauses.waited_s == [0.1, 0.2, 0.4, 0.8, 1.6, MAX_PAUSE_S, MAX_PAUSE_S]
    assert reported == [UNAVAILABLE] * 7
    backoff.reset()
    backoff.wait(UNAVAILABLE, pauses)
    assert pauses.waited_s[-1] == 0.1


def test_redis_backoff_returns_as_soon_as_it_is_stopped() -> None:
    """The real event, already set: a pause of an hour does not last."""
    stop = threading.Event()
    stop.set()
    backoff = RedisBackoff("claim", max_s=3600.0)
    for _ in range(20):
        backoff.wait(UNAVAILABLE, stop)


def test_error_that_passes_is_logged_once_per_outage() -> None:
    """The end of the outage is logged with its length, and the next outage again."""
    clock = Clock()
    backoff = RedisBackoff("commit", clock=clock.monotonic)
    with capture_logs() as logs:
        backoff.reset()
        for _ in range(3):
            backoff.wait(UNAVAILABLE, Pauses())
            clock.now_s += LOG_INTERVAL_S
        backoff.reset()
        backoff.reset()
        backoff.wait(UNAVAILABLE, Pauses())
    events = [line["event"] for line in logs]
    assert events == ["redis_unavailable", "redis_available", "redis_unavailable"]
    assert (logs[0]["where"], logs[0]["code"], logs[0]["kind"]) == ("commit", "redis_away", "ConnectionError")
    assert (logs[1]["where"], logs[1]["after_s"]) == ("commit", 3 * LOG_INTERVAL_S)


def test_error_that_does_not_pass_is_logged_again() -> None:
    """Every 30 s, with what to do; another error in between is logged immediately."""
    clock = Clock()
    backoff = RedisBackoff("claim", clock=clock.monotonic)
    with capture_logs() as logs:
        backoff.wait(REFUSED, Pauses())
        clock.now_s += LOG_INTERVAL_S - 1
        backoff.wait(REFUSED, Pauses())
        assert len(logs) == 1
        clock.now_s += 1
        backoff.wait(REFUSED, Pauses())
        assert len(logs) == 2
        backoff.wait(UNAVAILABLE, Pauses())
    assert [line["event"] for line in logs] == ["redis_refused", "redis_refused", "redis_unavailable"]
    assert (logs[0]["code"], bool(logs[0]["remedy"])) == ("redis_login", True)
