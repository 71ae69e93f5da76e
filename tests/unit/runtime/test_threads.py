"""Threads of a worker process: how their failures are reported, and how they end."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.runtime.threads import ServiceThread

TIMEOUT_S = 5.0


def test_failed_thread_reports_one_internal_error() -> None:
    """The error is logged with its traceback, and the report names its type and text."""
    reported: list[tuple[FatalError, str]] = []

    def loop() -> None:
        raise ValueError("broken")

    thread = ServiceThread(
        "commit", loop, on_fatal=lambda error: reported.append((error, threading.current_thread().name))
    )
    with capture_logs() as logs:
        thread.start()
        assert thread.join(TIMEOUT_S)
    [(error, reporter)] = reported
    assert (error.exit_code, str(error), reporter) == (ExitCode.INTERNAL, "ValueError: broken", "commit")
    assert [(line["event"], line["thread"], line["exc_info"]) for line in logs] == [("thread_failed", "commit", True)]


def test_fatal_error_of_a_thread_is_passed_on_unchanged() -> None:
    """The exit code decides about a restart, so it is not replaced, and no traceback is logged."""
    expected = FatalError(ExitCode.CONFIG, "expected another password")
    reported: list[FatalError] = []

    def loop() -> None:
        raise expected

    thread = ServiceThread("claim", loop, on_fatal=reported.append)
    with capture_logs() as logs:
        thread.start()
        assert thread.join(TIMEOUT_S)
    assert (reported, logs) == ([expected], [])


def test_failed_thread_without_report_is_logged() -> None:
    """The process goes on without the thread, and nothing is printed by Python's own hook."""

    def loop() -> None:
        raise ValueError("broken")

    thread = ServiceThread("traces", loop, on_fatal=None)
    with capture_logs() as logs:
        thread.start()
        assert thread.join(TIMEOUT_S)
    assert [line["event"] for line in logs] == ["thread_failed"]


def test_thread_that_returns_reports_nothing() -> None:
    """A loop that was asked to stop is no failure."""
    thread = ServiceThread("commit", lambda: None, on_fatal=pytest.fail)
    thread.start()
    assert thread.join(TIMEOUT_S)


def test_close_asks_the_loop_to_stop_and_waits() -> None:
    """The thread runs from `start` until its loop has returned."""
    stop = threading.Event()
    thread = ServiceThread("heartbeat", lambda: stop.wait(TIMEOUT_S) and None, on_fatal=pytest.fail, stop=stop.set)
    assert not thread.is_alive
    thread.start()
    assert thread.is_alive
    assert thread.close(TIMEOUT_S)
    assert (thread.is_alive, stop.is_set()) == (False, True)


def test_close_returns_false_after_its_timeout() -> None:
    """A loop that does not stop must not hold up the end of the process: the thread is a daemon."""
    stop = threading.Event()
    thread = ServiceThread("encode", lambda: stop.wait(TIMEOUT_S) and None, on_fatal=pytest.fail)
    thread.start()
    assert thread.close(0.01) is False
    assert thread.is_alive
    assert thread._thread.daemon
    stop.set()
    assert thread.join(TIMEOUT_S)


def test_close_of_a_thread_that_never_started_is_allowed() -> None:
    """A start that fails half-way closes all parts."""
    stop = threading.Event()
    assert ServiceThread("score", lambda: None, on_fatal=None, stop=stop.set).close(TIMEOUT_S)
    assert stop.is_set()
