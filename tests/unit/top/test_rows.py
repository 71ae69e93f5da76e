"""Figures as texts of limited width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shiwu.broker.worker_state import WorkerState
from shiwu.top import once, panels, rows
from shiwu.top.look import BackfillLook, Look, WorkerLook


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.04, "0.0"),
        (12.34, "12.3"),
        (812.4, "812"),
        (99_999, "99,999"),
        (100_000, "100k"),
        (999_600, "1.0M"),
        (12_345_678, "12.3M"),
    ],
)
def test_number_takes_seven_characters_at_most(value: float, expected: str) -> None:
    assert rows.number(value) == expected
    assert len(expected) <= 7


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ((), 10, ""),
        ((5,), 0, ""),
        ((0, 0, 0), 10, "▁▁▁"),
        ((0, 1, 60), 10, "▁▂█"),
        ((0, 30, 60, 0), 2, "▅█"),
        (tuple(range(60)), 5, "▃▄▅▆█"),
    ],
    ids=["none", "no-width", "empty-lane", "little", "joined", "long"],
)
def test_spark_shows_the_largest_of_each_part(values: tuple[int, ...], width: int, expected: str) -> None:
    """Only nothing has the lowest bar."""
    assert rows.spark(values, width=width) == expected


@pytest.mark.parametrize(("share", "expected"), [(-1.0, 0), (0.0, 0), (0.5, 5), (1.0, 10), (9.0, 10)])
def test_bar_stays_in_its_width(share: float, expected: int) -> None:
    assert rows.bar(share, width=10) == "█" * expected


def test_worker_of_an_older_version_has_no_figures() -> None:
    """It is listed all the same."""
    cells = rows.worker_cells(WorkerLook("old", None))
    assert cells[0] == "old"
    assert set(cells[1:]) == {rows.NONE}
    assert len(cells) == len(rows.WORKER_HEADINGS)


def test_texts_of_others_are_escaped() -> None:
    """Names of workers, models and backfills come from Redis."""
    worker = WorkerLook("a\x1b[2J", WorkerState(model="m\x07", limit="\x1b]0;x"))
    backfill = BackfillLook("b\x1b", "phase\n", is_run=True, read=1, sent=1, answered=0, without_tags=0)
    for text in (*rows.worker_cells(worker), *rows.backfill_cells(backfill)):
        assert text.isprintable(), text


@pytest.mark.parametrize(
    ("phase", "is_run", "expected"),
    [("running", True, "running"), ("running", False, "not run"), ("finished", False, "finished")],
)
def test_backfill_without_a_process_is_shown_as_such(phase: str, is_run: bool, expected: str) -> None:
    look = BackfillLook("night", phase, is_run=is_run, read=9, sent=8, answered=7, without_tags=1)
    assert rows.backfill_cells(look) == ("night", expected, "7/8", "1")


def test_problem_names_the_time_and_the_reason() -> None:
    assert rows.problem_line(Look()) == ""
    assert rows.problem_line(Look(problem="no\x1broute", away_s=12.0)) == (
        "Redis does not answer for 12.0 s: no\\u001broute"
    )


@pytest.mark.parametrize(("count", "expected"), [(0, "0 workers"), (1, "1 worker"), (2, "2 workers")])
def test_one_worker_is_singular(count: int, expected: str) -> None:
    """In the first line of the screen, and in the tables of --once."""
    look = Look(workers=tuple(WorkerLook(f"w{number}", None) for number in range(count)))
    assert f"  {expected}  " in panels.title_text(look, where="h", note="").plain
    once.print_tables(Console(file=(out := io.StringIO()), width=100), look)
    assert f"\n{expected}, 0 images/s\n" in out.getvalue()
