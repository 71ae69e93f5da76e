"""The front door: what a stranger sees first."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import Process, clean_environment


@pytest.fixture
def demo(tmp_path: Path) -> Process:
    """`python -m demo`, not started."""
    return Process([sys.executable, "-m", "demo"], name="demo", folder=tmp_path, env=clean_environment({}))


def test_the_demo_tags_every_good_picture_and_names_every_error(demo: Process) -> None:
    """Exit code 0, nothing unexpected, and the embedded model knows about half of its samples at once."""
    with demo:
        assert demo.wait(timeout_s=150) == 0, demo.log_tail(lines=80)
    text = demo.log_text()
    assert "30 tagged, 5 failed as expected, 0 not as expected" in text
    found = re.search(r"came\s+first\s+for\s+(\d+)\s+of\s+30\s+and\s+among\s+the\s+first\s+five\s+for\s+(\d+)", text)
    assert found, text
    assert int(found[1]) >= 14
    assert int(found[2]) >= 22
    for code in ("picture_broken", "source_not_found", "not_a_picture", "source_forbidden"):
        assert code in text
