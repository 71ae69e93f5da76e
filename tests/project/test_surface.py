"""The public surface changes on purpose only."""

from __future__ import annotations

import json

import pytest

from tests.golden.surface import SURFACE, log_events, sources, surface


@pytest.fixture(scope="module")
def now() -> dict[str, object]:
    """The surface of the present code, through JSON."""
    found: dict[str, object] = json.loads(json.dumps(surface()))
    return found


@pytest.mark.parametrize("part", json.loads(SURFACE.read_text(encoding="utf-8")))
def test_part_of_the_surface_is_unchanged(part: str, now: dict[str, object]) -> None:
    """After an intended change: `python -m tests.golden.surface`, and a line in CHANGELOG.md."""
    assert now[part] == json.loads(SURFACE.read_text(encoding="utf-8"))[part]


def test_surface_has_no_unrecorded_part(now: dict[str, object]) -> None:
    """A new part of `surface.py` is written to the file."""
    assert now.keys() == json.loads(SURFACE.read_text(encoding="utf-8")).keys()


def test_log_events_are_found_in_both_sides() -> None:
    """The scan of the sources sees the events of real files."""
    found = {event for path in sources() for event in log_events(path)}
    assert {"ready", "redis_unavailable"} <= found
