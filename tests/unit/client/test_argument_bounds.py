"""Bounds of the client's arguments belong to what is allowed."""

from __future__ import annotations

import pytest

from shiwu import RequestError
from shiwu.client.arguments import (
    MAX_INTEGER,
    MAX_LOOKED_UP_ID_BYTES,
    MAX_TIME_S,
    read_id,
    read_ids,
    read_integer,
    read_seconds,
    read_text,
)


def test_bounds_are_allowed_and_one_more_is_not() -> None:
    """Durations, whole numbers, texts and ids, the least and the most."""
    assert [read_seconds("x", value) for value in (0, MAX_TIME_S)] == [0.0, MAX_TIME_S]
    assert read_seconds("x", 2, least=2.0, most=2.0) == 2.0
    assert [read_integer("x", value) for value in (0, MAX_INTEGER)] == [0, MAX_INTEGER]
    assert read_integer("x", 3, least=3, most=3) == 3
    assert [read_text("x", value) for value in ("", "x" * 1000)] == ["", "x" * 1000]
    assert read_text("x", "猫猫", least=2, most=2) == "猫猫"
    for value in ("x", "x" * MAX_LOOKED_UP_ID_BYTES):
        assert read_id(value) == value
    for refused in (
        lambda: read_seconds("x", -0.001),
        lambda: read_seconds("x", MAX_TIME_S + 1),
        lambda: read_seconds("x", 1.9, least=2.0),
        lambda: read_integer("x", -1),
        lambda: read_integer("x", MAX_INTEGER + 1),
        lambda: read_text("x", "", least=1),
        lambda: read_text("x", "x" * 1001),
        lambda: read_id(""),
        lambda: read_id("x" * (MAX_LOOKED_UP_ID_BYTES + 1)),
    ):
        with pytest.raises(RequestError):
            refused()


def test_one_id_counts_as_several() -> None:
    """A text is one id, any iterable is many; bytes are none."""
    assert read_ids("ids", "ab") == ["ab"]
    assert read_ids("ids", iter(("a", "b"))) == ["a", "b"]
    with pytest.raises(RequestError, match="expected an id, or several of them"):
        read_ids("ids", b"ab")
