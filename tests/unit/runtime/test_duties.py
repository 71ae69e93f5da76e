"""Duties of a periodic thread: which failures skip others, end the thread, or only are counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from structlog.testing import capture_logs

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.runtime.duties import LOG_INTERVAL_S, Duties, Duty

REFUSED = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
DOWN = redis.ConnectionError("Connection refused")


def raising(error: Exception) -> Callable[[], None]:
    """A duty that fails with this error."""

    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize("error", [REFUSED, PermissionError("no folder"), KeyError("unknown")], ids=repr)
def test_failed_duty_skips_no_other_duty(error: Exception) -> None:
    """A refused command, a file that cannot be written and a defect each cost their own duty only."""
    done: list[str] = []
    failed: list[str] = []
    duties = Duties(
        [Duty("first", raising(error)), Duty("second", lambda: done.append("second"))], on_failed=failed.append
    )
    with capture_logs() as logs:
        assert duties.run() is None
    assert (done, failed) == (["second"], ["first"])
    assert [(line["event"], line["duty"], line["kind"]) for line in logs] == [
        ("duty_failed", "first", type(error).__name__)
    ]


def test_unavailable_redis_ends_the_round() -> None:
    """Every further command would wait for its time-out, so the thread pauses and begins again."""
    done: list[str] = []
    duties = Duties([Duty("first", raising(DOWN)), Duty("second", lambda: done.append("second"))])
    assert (duties.run(), done) == (DOWN, [])


def test_refused_vital_duty_is_returned_after_the_others() -> None:
    """The thread pauses and the worker is not ready, but the other duties have run."""
    done: list[str] = []
    duties = Duties([Duty("leases", raising(REFUSED), is_vital=True), Duty("second", lambda: done.append("second"))])
    assert (duties.run(), done) == (REFUSED, ["second"])


@pytest.mark.parametrize("error", [KeyError("unknown"), FatalError(ExitCode.DEVICE, "lost")], ids=repr)
def test_defect_of_a_vital_duty_ends_the_thread(error: Exception) -> None:
    """A worker that cannot renew its leases must not go on claiming."""
    with pytest.raises(type(error)):
        Duties([Duty("leases", raising(error), is_vital=True)]).run()


def test_failing_duty_is_logged_again_after_a_while() -> None:
    """One line each 30 s, one count each time, and a line when the duty succeeds again."""
    errors: list[Exception | None] = [REFUSED, REFUSED, REFUSED, None, None]
    now_s = 0.0
    failed: list[str] = []

    def run() -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    duties = Duties([Duty("trim", run)], on_failed=failed.append, clock=lambda: now_s)
    with capture_logs() as logs:
        for pause_s in (1.0, LOG_INTERVAL_S, 1.0, 1.0, 1.0):
            duties.run()
            now_s += pause_s
    assert [line["event"] for line in logs] == ["duty_failed", "duty_failed", "duty_recovered"]
    assert failed == ["trim"] * 3
