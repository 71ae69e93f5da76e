"""The tables of `shiwu top --once` on a narrow terminal."""

from __future__ import annotations

import io

from rich.console import Console

from shiwu.top.once import _print


def test_columns_without_room_are_left_out_whole() -> None:
    """No heading is broken into letters; the first columns, and on a wide terminal all, are shown as they are."""
    headings, row = ("lane", "waiting", "claimed", "in/s", "out/s", "oldest"), ("interactive", *"12345")
    for width, shown in ((40, 4), (200, 6), (10, 2)):
        out = io.StringIO()
        _print(Console(file=out, width=width), headings, [row])
        lines = out.getvalue().splitlines()
        if width > 10:
            assert [line.split() for line in lines] == [list(headings[:shown]), list(row[:shown])]
        assert not {"out/s", "oldest"} & set(lines[0].split()) or width == 200
