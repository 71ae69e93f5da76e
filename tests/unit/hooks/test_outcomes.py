"""What the reply to a delivery means, and what a line of the log shows."""

from __future__ import annotations

import io
import json
import logging

import pytest

from shiwu.hooks.event_log import EventLog, LibraryLines
from shiwu.hooks.sender import MAX_RETRY_AFTER_S, classify


@pytest.mark.parametrize(
    ("status", "reason", "is_delivered", "is_gone", "is_throttled"),
    [
        (200, "delivered", True, False, False),
        (204, "delivered", True, False, False),
        (299, "delivered", True, False, False),
        (300, "redirect", False, False, False),
        (304, "redirect", False, False, False),
        (400, "http_400", False, False, False),
        (410, "http_410", False, True, False),
        (429, "http_429", False, False, True),
        (500, "http_500", False, False, False),
        (502, "http_502", False, False, True),
        (503, "http_503", False, False, False),
        (504, "http_504", False, False, True),
    ],
)
def test_status_decides_the_outcome(
    status: int, reason: str, is_delivered: bool, is_gone: bool, is_throttled: bool
) -> None:
    """Only 2xx is a success."""
    found = classify(status, {})
    assert (found.reason, found.is_delivered, found.is_gone, found.is_throttled) == (
        reason,
        is_delivered,
        is_gone,
        is_throttled,
    )


@pytest.mark.parametrize(
    ("text", "pause_s"), [("7", 7.0), ("999999999", MAX_RETRY_AFTER_S), ("soon", None), ("-1", None), ("", None)]
)
def test_retry_after_is_limited_to_a_day(text: str, pause_s: float | None) -> None:
    """It counts for every failure, and makes it a throttled one."""
    found = classify(503, {"Retry-After": text})
    assert (found.retry_after_s, found.is_throttled) == (pause_s, pause_s is not None)


def test_log_line_hides_logins_and_controls() -> None:
    """One line of JSON for each event, whatever its fields hold; unset fields are left out."""
    stream = io.StringIO()
    log = EventLog(stream)
    log.info("delivered", webhook_id="a\nb\x1b", status=None)
    handler = LibraryLines(log)
    handler.emit(logging.LogRecord("shiwu", logging.WARNING, "", 0, "at redis://u:pw@h/0", None, None))
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["webhook_id"] == "a\nb\\u001b"
    assert "status" not in first
    assert second["message"] == "at redis://h/0"
