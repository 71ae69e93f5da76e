"""What a backfill shows: the line behind the bar, JSON lines, durations."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from shiwu.backfill import display
from shiwu.backfill.display import JsonLines, duration, failures_of, line_of
from shiwu.backfill.runner import Progress, Rate

PROGRESS = Progress(
    phase="running",
    reason="",
    read=2500,
    left_out=100,
    sent=2400,
    unanswered=400,
    answered=2000,
    total=12_000,
    rate=100.0,
    by_status={"tagged": 1990, "failed": 10},
    by_code={"source_unavailable": 10},
)


def test_line_has_rate_time_left_and_backlog() -> None:
    assert line_of(PROGRESS) == "2,000/12,000  100/s  1:40 left  400 waiting (4 s)  10 source_unavailable"


def test_line_without_total_has_no_time_left() -> None:
    """As while a bucket is counted, and before the first answer."""
    begun = replace(PROGRESS, total=None, rate=0.0, by_code={}, reason="paused")
    assert line_of(begun) == "2,000/?  0/s  400 waiting  paused"
    assert (begun.left, begun.eta_s, begun.backlog_s) == (None, None, None)


def test_reason_on_the_line_has_no_control_characters() -> None:
    """It may quote Redis' errors."""
    assert "\x1b" not in line_of(replace(PROGRESS, reason="odd \x1b[31m"))


def test_most_frequent_failures_are_named() -> None:
    """Cancelled jobs are no failures."""
    codes = {"a": 2000, "b": 30, "c": 4, "d": 2, "e": 1, "cancelled": 50}
    assert failures_of(codes) == "2,000 a, 30 b, 4 c, 3 others"
    assert failures_of({"cancelled": 50}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_duration_is_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_line_comes_every_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now_s[0])
    lines = JsonLines("night")
    for now_s[0] in (1.0, 9.9, 10.0, 15.0, 20.5):
        lines(PROGRESS)
    found: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2
    assert found[0] | {"by_status": {}} == {
        "backfill": "night",
        "phase": "running",
        "reason": "",
        "read": 2500,
        "left_out": 100,
        "sent": 2400,
        "unanswered": 400,
        "answered": 2000,
        "total": 12_000,
        "rate": 100.0,
        "eta_s": 100.0,
        "backlog_s": 4.0,
        "by_status": {},
        "by_code": {"source_unavailable": 10},
    }


def test_bar_stays_on_one_line_of_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(display.sys, "stderr", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(
        display, "Console", lambda **_: Console(file=shown, force_terminal=True, width=60, color_system=None)
    )
    with display.open_display("night") as show:
        show(replace(PROGRESS, reason="a reason that is longer than what is left of the line"))
    lines = [line for line in shown.getvalue().replace("\r", "\n").split("\n") if "2,000/12,000" in line]
    assert lines
    assert "a reason" not in shown.getvalue()


def test_rate_is_the_mean_of_the_last_minute() -> None:
    rate = Rate()
    assert rate.update(0, now_s=0) == 0
    assert rate.update(100, now_s=10) == 10
    assert rate.update(100, now_s=60) == pytest.approx(100 / 60)
    assert rate.update(160, now_s=100) == pytest.approx(60 / 40)
